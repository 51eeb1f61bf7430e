from __future__ import annotations

import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry
from torch import Tensor

from router_service.dispatch.local_experts import LocalExperts
from router_service.experts import StepContext, StepTrace
from services.core.checkpoints.checkpoint import Checkpoint
from services.core.expert_ffn import computed_digest
from services.core.telemetry import (
    ATTR_EXPERT_IDS,
    ATTR_GATE_WEIGHTS,
    ATTR_LAYER,
    ATTR_NUM_TOKENS,
    ATTR_TOKENS_PER_EXPERT,
    METRIC_EXPERT_TOKENS,
    SPAN_LAYER,
)
from tests.support.checkpoints import make_checkpoint
from tests.support.moe_layers import random_gate

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(str(make_checkpoint(tmp_path_factory.mktemp("model"))))


def loaded(checkpoint: Checkpoint, metrics: CollectorRegistry | None = None) -> LocalExperts:
    return LocalExperts.load(checkpoint, dtype=torch.float32, device=CPU, metrics=metrics)


def call(checkpoint: Checkpoint, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    hidden_states = torch.randn(num_tokens, checkpoint.config.hidden_size, generator=generator)
    ids, weights = random_gate(generator, num_tokens=num_tokens, num_experts=4, top_k=2)
    return hidden_states, ids, weights


async def test_the_output_is_the_weighted_sum_of_the_checkpoints_experts(
    checkpoint: Checkpoint,
) -> None:
    hidden_states, ids, weights = call(checkpoint, 11)
    output = await loaded(checkpoint).forward(1, hidden_states, ids, weights, StepContext())
    expected = torch.zeros_like(hidden_states, dtype=torch.float64)
    for token, row in enumerate(hidden_states.double()):
        for expert, weight in zip(ids[token].tolist(), weights[token].tolist(), strict=True):
            w = checkpoint.expert(1, expert)
            gated = F.silu(w.w1.double() @ row) * (w.w3.double() @ row)
            expected[token] += weight * (w.w2.double() @ gated)
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_call_never_waits(checkpoint: Checkpoint) -> None:
    coroutine = loaded(checkpoint).forward(0, *call(checkpoint, 3), StepContext())
    with pytest.raises(StopIteration) as ended:
        coroutine.send(None)
    assert ended.value.value.shape == (3, checkpoint.config.hidden_size)


def test_progress_is_told_by_layer_and_slots_have_the_digests_that_workers_give(
    checkpoint: Checkpoint,
) -> None:
    progress: list[tuple[int, int]] = []
    experts = LocalExperts.load(
        checkpoint,
        dtype=torch.float32,
        device=CPU,
        on_layer=lambda done, total: progress.append((done, total)),
    )
    assert progress == [(1, 2), (2, 2)]
    assert experts.slot_digests() == {
        (layer, expert): computed_digest(checkpoint.slot_digest(layer, expert), "float32")
        for layer in range(2)
        for expert in range(4)
    }


async def test_assignments_are_counted_and_scraped(checkpoint: Checkpoint) -> None:
    metrics = CollectorRegistry()
    experts = loaded(checkpoint, metrics)
    hidden_states, ids, weights = call(checkpoint, 20)
    await experts.forward(1, hidden_states, ids, weights, StepContext())
    await experts.forward(1, hidden_states, ids, weights, StepContext())
    counts = 2 * np.bincount(ids.numpy().ravel(), minlength=4)
    assert experts.expert_load().tolist() == [[0] * 4, counts.tolist()]
    sample = metrics.get_sample_value(METRIC_EXPERT_TOKENS, {"layer": "1", "expert": "2"})
    assert sample == counts[2]


async def test_a_sampled_step_has_a_span_per_layer_and_others_have_none(
    checkpoint: Checkpoint,
) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("test")
    experts = LocalExperts.load(checkpoint, dtype=torch.float32, device=CPU, tracer=tracer)
    ids, weights = torch.tensor([[0, 3], [3, 1]]), torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    hidden_states = torch.randn(2, checkpoint.config.hidden_size)
    await experts.forward(0, hidden_states, ids, weights, StepContext())
    step = tracer.start_span("step")
    trace = StepTrace(step)
    await experts.forward(1, hidden_states, ids, weights, StepContext(trace=trace))
    assert exporter.get_finished_spans() == ()
    trace.end(time.time_ns())
    span, ended_step = exporter.get_finished_spans()
    assert ended_step.name == "step"
    assert span.name == SPAN_LAYER
    assert span.parent is not None
    assert span.parent.span_id == step.get_span_context().span_id
    assert span.attributes == {
        ATTR_LAYER: 1,
        ATTR_NUM_TOKENS: 2,
        ATTR_EXPERT_IDS: (0, 1, 3),
        ATTR_TOKENS_PER_EXPERT: (1, 1, 2),
        ATTR_GATE_WEIGHTS: (0.75, 0.5, 0.375),
    }
