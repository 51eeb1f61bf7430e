from __future__ import annotations

from benchmarks.delay import Job, Measured, _ratio, _row
from router_service.engine.step_timings import StepTimings


def test_a_row_says_how_many_tokens_came_and_where_a_step_s_time_went() -> None:
    one = Measured(rates=[100.0, 200.0, 400.0])
    two = Measured(
        rates=[150.0, 400.0, 600.0],
        timings=StepTimings(
            num_steps=10,
            num_micro_batches=18,
            step_s=0.5,
            schedule_s=0.01,
            prepare_s=0.02,
            emit_s=0.01,
            attention_s=0.1,
            head_s=0.03,
            sample_s=0.03,
        ),
    )
    assert _ratio(two, one) == 1.5
    cells = [cell.strip() for cell in _row(Job(count="auto", streams=64), two, one).split("|")]
    assert cells[1:-1] == ["64", "auto (1.8)", "400", "1.50", "50.00", "4.00", "16.00", "30.00"]
