from __future__ import annotations

from router_service.dispatch.worker_health import FAULTS_TO_EJECT, WorkerHealth


def ejected(now: float = 100.0) -> WorkerHealth:
    health = WorkerHealth()
    assert [health.failed(now) for _ in range(FAULTS_TO_EJECT)] == [False, False, True]
    return health


def test_faults_in_a_row_eject_and_a_success_between_them_does_not() -> None:
    health = WorkerHealth()
    for _ in range(10):
        assert not health.failed(1.0)
        assert not health.failed(1.0)
        health.succeeded()
    assert not health.is_sick
    assert ejected().is_sick


def test_an_ejected_worker_is_probed_after_a_while_and_ejected_again_by_one_fault() -> None:
    health = ejected(100.0)
    assert not health.is_due(100.4)
    assert health.is_due(100.5)
    health.returned()
    assert not health.is_sick
    assert health.failed(101.0)
    assert not health.is_due(101.9)
    assert health.is_due(102.0)


def test_probes_that_fail_are_made_less_and_less_often() -> None:
    health = ejected(0.0)
    now, waits = 0.0, []
    for _ in range(10):
        waits.append(health.retry_at - now)
        now = health.retry_at
        health.probe_failed(now)
    assert waits[:4] == [0.5, 1.0, 2.0, 4.0]
    assert max(waits) == 30.0


def test_old_ejections_are_forgiven() -> None:
    health = ejected(0.0)
    for _ in range(5):
        health.probe_failed(health.retry_at)
    health.returned()
    assert health.failed(health.retry_at + 61.0)
    assert health.num_ejections == 1
