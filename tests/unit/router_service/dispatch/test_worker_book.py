from __future__ import annotations

import pytest

from router_service.dispatch.retry_budget import RetryBudget
from router_service.dispatch.worker_book import MIN_DEADLINE_S, WorkerBook, WorkShape


def busy_book(
    *, num_answers: int = 200, per_expert_s: float = 1e-3, per_row_s: float = 2e-5
) -> tuple[WorkerBook, WorkShape]:
    """A worker that was seen with 1 to 8 experts and 1 to 64 rows, always at the same pace."""
    shape = WorkShape()
    book = WorkerBook("a", shape)
    for number in range(num_answers):
        answer(book, 1 + 9 * number % 64, 1 + number % 8, per_expert_s, per_row_s)
    return book, shape


def answer(
    book: WorkerBook, rows: int, experts: int, per_expert_s: float = 1e-3, per_row_s: float = 2e-5
) -> None:
    compute_s = per_expert_s * experts + per_row_s * rows
    expected_s = book.sent(rows, experts)
    book.answered(rows, experts, compute_s + 3e-4, expected_s=expected_s, compute_s=compute_s)


def deadline(book: WorkerBook, expected_s: float, rows: int, usual_s: float = 1e-3) -> float:
    return book.deadline_s(expected_s, rows, call_timeout_s=30.0, usual_overhead_s=usual_s)


@pytest.mark.parametrize(("per_expert_s", "per_row_s"), [(1e-3, 1e-5), (1e-3, 1e-4), (3e-4, 1e-4)])
def test_what_an_expert_costs_in_rows_is_learnt(per_expert_s: float, per_row_s: float) -> None:
    book, shape = busy_book(num_answers=600, per_expert_s=per_expert_s, per_row_s=per_row_s)
    assert shape.expert_rows == pytest.approx(per_expert_s / per_row_s, rel=0.1)
    expected_s = book.sent(40, 4)
    assert expected_s == pytest.approx(4 * per_expert_s + 40 * per_row_s + 3e-4, rel=0.3)


def test_outstanding_work_puts_the_expected_finish_off_until_it_is_answered() -> None:
    book, _ = busy_book()
    idle_s = book.start_s
    first_s = book.sent(32, 4)
    assert book.start_s > idle_s + 0.5 * first_s
    assert book.sent(32, 4) > 1.5 * first_s
    book.dropped(32, 4)
    book.dropped(32, 4)
    assert book.start_s == pytest.approx(idle_s)
    assert book.outstanding_rows == 0


def test_a_new_worker_has_the_whole_time_of_a_call() -> None:
    book = WorkerBook("a", WorkShape())
    assert deadline(book, 0.001, 1) == 30.0


def test_a_deadline_has_a_floor_scales_with_rows_and_never_passes_the_calls() -> None:
    book, _ = busy_book()
    small = deadline(book, book.sent(8, 2), 8)
    large = deadline(book, book.sent(200, 8), 200)
    assert MIN_DEADLINE_S < small < 0.25
    assert large > small
    assert deadline(book, 1e9, 200) == 30.0


def test_a_prefill_far_larger_than_all_seen_is_not_thought_late() -> None:
    book, shape = busy_book()
    rows = 5 * shape.max_rows
    assert deadline(book, book.sent(rows, 8), rows) == 30.0


def test_a_slow_worker_gets_no_longer_a_deadline_than_its_peers() -> None:
    book, _ = busy_book()
    for _ in range(20):
        expected_s = book.sent(8, 2)
        book.answered(8, 2, 0.5, expected_s=expected_s, compute_s=2e-3)
    assert book.start_s > 0.1
    assert deadline(book, book.sent(8, 2), 8) < 0.45


def test_jitter_raises_the_deadline_and_is_forgotten_slowly() -> None:
    book, _ = busy_book()
    before = deadline(book, 0.005, 8)
    for _ in range(5):
        expected_s = book.sent(8, 2)
        book.answered(8, 2, 20 * expected_s, expected_s=expected_s, compute_s=2e-3)
        book.overhead_s = 3e-4
    assert deadline(book, 0.005, 8) > before + 0.01


def test_a_slow_answer_is_forgotten_with_time_so_that_the_worker_is_tried_again() -> None:
    book, _ = busy_book()
    usual_s = book.start_s
    book.answered(8, 2, 1.0, expected_s=book.sent(8, 2), compute_s=2e-3)
    assert book.start_s > 10 * usual_s
    for _ in range(20):
        book.fade()
    assert book.start_s < 3 * usual_s


def test_an_avoided_worker_is_a_last_resort_and_a_penalty_fades_with_answers() -> None:
    book, _ = busy_book()
    usual_s = book.start_s
    book.avoid(True)
    assert book.start_s > 1e5
    book.fade()
    assert book.start_s > 1e5
    book.avoid(False, 0.05)
    assert book.start_s == pytest.approx(usual_s + 0.05)
    for _ in range(8):
        answer(book, 8, 2)
    assert book.start_s < usual_s + 0.01


def test_a_storm_of_resends_is_bounded_by_a_part_of_what_is_sent() -> None:
    budget = RetryBudget(ratio=0.2, burst=10)
    assert sum(budget.take() for _ in range(100)) == 10
    taken = 0
    for _ in range(1000):
        budget.earn(1)
        taken += sum(budget.take() for _ in range(5))
    assert 190 <= taken <= 200
    budget.earn(10**6)
    assert budget.tokens == 10
