from __future__ import annotations

import dataclasses
import queue
from collections.abc import Iterator, Sequence

import pytest
import torch

from expert_service.compute import ComputeThread, Job, Outcome
from expert_service.held_experts import HeldExperts
from services.core.checkpoints.checkpoint import ExpertWeights
from services.core.errors import ExpertfleetError, MalformedFrameError
from services.core.expert_ffn import PackedExpert, moe_forward
from services.core.wire import RequestFrame
from tests.support.checkpoints import fresh_seed
from tests.support.frames import random_assignments, random_weights

HIDDEN = 32
CPU = torch.device("cpu")


class Bench:
    """A compute thread that holds experts 0 and 1 of layers 0 and 1."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(fresh_seed())
        self.dtype = dtype
        self.layers = {layer: {expert: self._expert() for expert in range(2)} for layer in range(2)}
        self.batches: queue.SimpleQueue[Sequence[Outcome]] = queue.SimpleQueue()
        self.held = HeldExperts(
            layers=self.layers, digests={}, dtype=dtype, device=CPU, hidden_size=HIDDEN
        )
        self.thread = ComputeThread(num_threads=1, is_native=True, deliver=self.batches.put)

    def frame(self, *, layer: int = 0, call_id: int = 0, num_tokens: int = 3) -> RequestFrame:
        return RequestFrame(
            call_id=call_id,
            layer=layer,
            hidden_states=torch.randn(num_tokens, HIDDEN, generator=self.generator).to(self.dtype),
            assignments=random_assignments(
                self.generator, num_tokens=num_tokens, expert_ids=(0, 1)
            ),
            combine=True,
            traceparent="",
        )

    def submit(
        self, frame: RequestFrame, *, is_wanted: bool = True, held: HeldExperts | None = None
    ) -> None:
        self.thread.submit(
            Job(
                frame=frame,
                held=held or self.held,
                arrived_ns=0,
                is_wanted=lambda: is_wanted,
                on_done=lambda outcome: None,
            )
        )

    def next_batch(self) -> Sequence[Outcome]:
        return self.batches.get(timeout=60)

    def alone(self, frame: RequestFrame) -> torch.Tensor:
        return moe_forward(
            self.layers[frame.layer], frame.hidden_states, frame.assignments, combine=True
        )

    def _expert(self) -> PackedExpert:
        weights = random_weights(self.generator, hidden=HIDDEN, intermediate=48, dtype=self.dtype)
        return PackedExpert(weights, dtype=self.dtype, device=CPU)


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench(torch.float32)
    yield bench
    bench.thread.stop()


def result_of(outcome: Outcome) -> torch.Tensor:
    assert isinstance(outcome.result, torch.Tensor), outcome.result
    return outcome.result


def error_of(outcome: Outcome) -> ExpertfleetError:
    assert isinstance(outcome.result, ExpertfleetError)
    return outcome.result


def test_waiting_frames_of_a_layer_are_one_batch_with_the_bits_they_have_alone(
    bench: Bench,
) -> None:
    frames = [
        bench.frame(layer=layer, call_id=call_id, num_tokens=1 + call_id)
        for call_id, layer in enumerate((1, 0, 1, 0, 1))
    ]
    for frame in frames:
        bench.submit(frame)
    bench.thread.start()
    batches = [bench.next_batch(), bench.next_batch()]
    assert [[o.job.frame.call_id for o in batch] for batch in batches] == [[0, 2, 4], [1, 3]]
    for outcome in (outcome for batch in batches for outcome in batch):
        assert torch.equal(result_of(outcome), bench.alone(outcome.job.frame))
    assert batches[0][0].batch_rows == sum(
        len(frame.assignments.token_rows) for frame in frames if frame.layer == 1
    )


def test_a_frame_with_nan_is_refused_and_its_neighbours_are_computed(bench: Bench) -> None:
    good, bad = bench.frame(call_id=1), bench.frame(call_id=2)
    bad.hidden_states[1, 5] = float("nan")
    for frame in (good, bad):
        bench.submit(frame)
    bench.thread.start()
    first, second = bench.next_batch()
    assert torch.equal(result_of(first), bench.alone(good))
    assert isinstance(error_of(second), MalformedFrameError)
    assert "NaN" in error_of(second).message
    assert "rows [1]" in error_of(second).message


def test_large_values_whose_sum_overflows_are_not_taken_for_infinity(bench: Bench) -> None:
    zeros = torch.zeros(48, HIDDEN)
    weights = ExpertWeights(w1=zeros, w2=zeros.t().contiguous(), w3=zeros)
    for experts in bench.layers.values():
        for expert_id in experts:
            experts[expert_id] = PackedExpert(weights, dtype=torch.float32, device=CPU)
    frame = bench.frame()
    frame.hidden_states.fill_(3e38)
    assert frame.hidden_states.sum().isinf()
    bench.submit(frame)
    bench.thread.start()
    assert result_of(bench.next_batch()[0]).count_nonzero() == 0


def test_a_row_that_overflows_an_expert_is_answered_beside_sound_ones() -> None:
    bench = Bench(torch.float16)
    frame = bench.frame(layer=1)
    alone = bench.alone(frame)
    overflowing = int(frame.assignments.token_rows[0])  # one that has an expert
    sound = [row for row in range(len(alone)) if row != overflowing]
    frame.hidden_states[overflowing].fill_(60000.0)
    bench.submit(frame)
    bench.thread.start()
    rows = result_of(bench.next_batch()[0])
    bench.thread.stop()
    assert not rows[overflowing].isfinite().all()
    assert torch.equal(rows[sound], alone[sound])


def test_a_failing_frame_does_not_fail_those_it_was_merged_with(bench: Bench) -> None:
    good, unchecked = bench.frame(call_id=1), bench.frame(call_id=2)
    assigned = dataclasses.replace(unchecked.assignments, expert_ids=(0, 9))
    bad = dataclasses.replace(unchecked, assignments=assigned)
    for frame in (good, bad):
        bench.submit(frame)
    bench.thread.start()
    first, second = bench.next_batch()
    assert torch.equal(result_of(first), bench.alone(good))
    assert "layer 0 could not be computed" in error_of(second).message


def test_a_frame_that_nobody_waits_for_is_not_computed(bench: Bench) -> None:
    bench.submit(bench.frame(call_id=1), is_wanted=False)
    bench.submit(bench.frame(call_id=2))
    bench.thread.start()
    assert [outcome.job.frame.call_id for outcome in bench.next_batch()] == [2]


def test_frames_accepted_before_and_after_a_change_are_computed_together(bench: Bench) -> None:
    """Each with the experts that were held when it came, one of which is gone meanwhile."""
    before = bench.held
    after = HeldExperts(
        layers={0: {0: bench.layers[0][0], 1: bench.layers[0][1]}, 1: {1: bench.layers[1][1]}},
        digests={},
        dtype=torch.float32,
        device=CPU,
        hidden_size=HIDDEN,
    )
    frames = [bench.frame(layer=1, call_id=call_id) for call_id in range(2)]
    only_one = dataclasses.replace(
        frames[1],
        assignments=random_assignments(bench.generator, num_tokens=3, expert_ids=(1,)),
    )
    bench.submit(frames[0], held=before)
    bench.submit(only_one, held=after)
    bench.submit(frames[0], held=before)
    bench.thread.start()
    outcomes = bench.next_batch()
    for outcome, frame in zip(outcomes, (frames[0], only_one, frames[0]), strict=True):
        assert torch.equal(result_of(outcome), bench.alone(frame))
