from __future__ import annotations

from router_service.session_tier.restore_policy import RestorePolicy

BLOCK_BYTES = 1000


def _policy() -> RestorePolicy:
    return RestorePolicy(block_size=16, block_bytes=BLOCK_BYTES, max_wait_s=5.0, retry_s=60.0)


def test_nothing_stored_is_nothing_to_fetch() -> None:
    assert not _policy().decide(0, now=0.0).fetch


def test_the_first_fetch_is_tried_with_the_longest_deadline() -> None:
    decision = _policy().decide(10, now=0.0)
    assert decision.fetch
    assert decision.deadline_s == 5.0


def test_a_fetch_that_was_never_measured_is_tried_for_about_as_long_as_recomputing_takes() -> None:
    policy = _policy()
    policy.observe_prefill(1600, 1.0)
    decision = policy.decide(100, now=0.0)
    assert decision.fetch
    assert decision.deadline_s == 1.0


def test_the_faster_way_is_chosen() -> None:
    policy = _policy()
    policy.observe_prefill(1600, 1.0)  # 100 blocks/s
    policy.observe_fetch(200 * BLOCK_BYTES, 1.0, now=0.0)
    assert policy.decide(50, now=1.0).fetch
    policy = _policy()
    policy.observe_prefill(1600, 1.0)
    policy.observe_fetch(50 * BLOCK_BYTES, 1.0, now=0.0)
    assert not policy.decide(50, now=1.0).fetch


def test_a_fetch_that_brought_nothing_lowers_the_rate() -> None:
    policy = _policy()
    policy.observe_prefill(1600, 1.0)
    policy.observe_fetch(200 * BLOCK_BYTES, 1.0, now=0.0)
    policy.observe_fetch(0, 3.0, now=1.0)
    assert not policy.decide(50, now=2.0).fetch


def test_a_way_that_lost_is_tried_again_after_a_while() -> None:
    policy = _policy()
    policy.observe_prefill(1600, 1.0)
    policy.observe_fetch(0, 1.0, now=0.0)
    assert not policy.decide(50, now=59.0).fetch
    assert policy.decide(50, now=61.0).fetch


def test_tiny_prefills_do_not_count_as_a_rate() -> None:
    policy = _policy()
    policy.observe_prefill(3, 1.0)
    assert policy.prefill_tokens_per_s is None


def test_rates_follow_what_was_measured_lately() -> None:
    policy = _policy()
    for _ in range(30):
        policy.observe_prefill(100, 1.0)
    for _ in range(30):
        policy.observe_prefill(1000, 1.0)
    rate = policy.prefill_tokens_per_s
    assert rate is not None
    assert 950 < rate <= 1000


def test_the_store_is_waited_for_about_as_long_as_computing_takes() -> None:
    policy = _policy()
    assert policy.patience_s(1000) == 1.0, "nothing is known yet"
    policy.observe_prefill(1600, 1.0)
    assert policy.patience_s(1) == 0.25
    assert policy.patience_s(50) == 0.5
    assert policy.patience_s(1000) == 1.0
