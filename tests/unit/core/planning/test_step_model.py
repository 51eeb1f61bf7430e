from __future__ import annotations

from dataclasses import replace

import pytest

from services.core.planning.gpus import find_gpu
from services.core.planning.kernels import Roofline
from services.core.planning.machine import (
    GPU_HOST_COSTS,
    Efficiency,
    HostCosts,
    Machine,
    Network,
    gpu_machine,
)
from services.core.planning.model_sizes import PUBLISHED_MODELS, ModelSizes
from services.core.planning.routing import Routing
from services.core.planning.step_model import Batch, Layout, StepModel, StepTime

SIZES = ModelSizes(config=PUBLISHED_MODELS["mixtral-8x22b"])
ONE_EXPERT_EACH = tuple((expert,) for expert in range(8))
FAST_NETWORK = Network(bandwidth=1e15, delay_s=0.0)
FREE = HostCosts(
    layer_s=0.0,
    frame_s=0.0,
    byte_s=0.0,
    local_layer_s=0.0,
    step_s=0.0,
    sequence_s=0.0,
    sample_s=0.0,
    logit_s=0.0,
)
L4 = gpu_machine(find_gpu("l4"), efficiency=Efficiency(), host=FREE)


def step(
    *,
    machine: Machine = L4,
    network: Network = FAST_NETWORK,
    tokens: int = 8,
    context: int = 1,
    layout: Layout | None = None,
) -> StepTime:
    model = StepModel(SIZES, machine, network, Routing(8, 2))
    batch = Batch(num_tokens=tokens, context=context)
    return model.step(batch, layout or Layout(groups=ONE_EXPERT_EACH))


def test_a_small_batch_reads_every_weight_once() -> None:
    # Eight pods read their experts at the same time, so a layer takes one expert and attention.
    seen = step(tokens=1)
    bandwidth = 300e9 * 0.8
    expert_s = SIZES.slot_bytes / bandwidth + 30e-6
    attention_s = 2 * SIZES.attention_params / bandwidth + 80e-6
    assert seen.layer.expert_s == pytest.approx(expert_s)
    assert seen.layer.attention_s == pytest.approx(attention_s, rel=1e-3)
    head_s = 2 * SIZES.head_params / bandwidth + 30e-6
    assert seen.step_s == pytest.approx(56 * (expert_s + attention_s) + head_s, rel=1e-3)


def test_the_parts_add_up_and_shares_are_of_the_whole() -> None:
    seen = step(
        network=Network(bandwidth=1e9, delay_s=1e-4), machine=replace(L4, host=GPU_HOST_COSTS)
    )
    assert seen.step_s == pytest.approx(
        seen.layers_s + seen.head_s + seen.sample_s + seen.overhead_s
    )
    assert seen.layers_s == pytest.approx(56 * (seen.layer.chain_s + seen.layer.stall_s))
    assert sum(seen.shares.values()) == pytest.approx(1.0)


def test_few_rows_are_bound_by_bandwidth_and_many_by_compute() -> None:
    assert step(tokens=4).bound_by == "bandwidth"
    assert step(tokens=8192).bound_by == "compute"


def test_a_thin_wire_binds() -> None:
    assert step(tokens=64, network=Network(bandwidth=1e8, delay_s=0.0)).bound_by == "wire"


def test_a_distant_worker_binds_by_round_trips() -> None:
    far = step(network=Network(bandwidth=1e15, delay_s=5e-3))
    assert far.bound_by == "round trips"
    assert far.step_s == pytest.approx(step().step_s + 56 * 2 * 5e-3)


def test_costly_frames_bind_by_round_trips() -> None:
    machine = replace(L4, host=replace(FREE, frame_s=5e-3))
    assert step(machine=machine).bound_by == "round trips"


def test_long_contexts_are_bound_by_reading_them() -> None:
    near, far = step(tokens=4, context=1024), step(tokens=4, context=65536)
    kv_bytes = 4 * (65536 - 1024) * SIZES.kv_bytes_per_token
    assert far.step_s - near.step_s == pytest.approx(kv_bytes / (300e9 * 0.8), rel=1e-6)
    assert far.bound_by == "bandwidth"


@pytest.mark.parametrize("tokens", [1, 8, 64, 512])
def test_more_bandwidth_is_never_slower(tokens: int) -> None:
    faster = gpu_machine(find_gpu("l4", bandwidth=600e9), efficiency=Efficiency(), host=FREE)
    assert step(machine=faster, tokens=tokens).step_s <= step(tokens=tokens).step_s
    thin, wide = Network(bandwidth=1e9, delay_s=0.0), Network(bandwidth=1e10, delay_s=0.0)
    assert step(network=wide, tokens=tokens).step_s <= step(network=thin, tokens=tokens).step_s


def test_more_tokens_are_never_faster() -> None:
    network = Network(bandwidth=3e9, delay_s=5e-5)
    times = [step(tokens=tokens, network=network).step_s for tokens in range(1, 80)]
    assert times == sorted(times)


def test_two_micro_batches_hide_the_delay() -> None:
    network = Network(bandwidth=1e15, delay_s=5e-3)
    one = step(tokens=64, network=network)
    two = step(
        tokens=64,
        network=network,
        layout=Layout(groups=ONE_EXPERT_EACH, num_micro_batches=2),
    )
    # Both wait for the same round trip, so splitting a batch brings nothing by itself ...
    assert two.step_s == pytest.approx(one.step_s, rel=0.05)
    # ... but the second batch comes for nothing beside the first.
    twice = step(
        tokens=128,
        network=network,
        layout=Layout(groups=ONE_EXPERT_EACH, num_micro_batches=2),
    )
    assert twice.step_s < 1.1 * one.step_s


def test_an_overloaded_pod_holds_everyone_up() -> None:
    groups = ONE_EXPERT_EACH
    alone = step(tokens=32, layout=Layout(groups=groups))
    crowded = step(tokens=32, layout=Layout(groups=groups, num_shards=16))
    assert crowded.layer.stall_s > 0
    assert crowded.layers_s == pytest.approx(56 * 16 * alone.layer.expert_s, rel=0.01)
    relieved = step(
        tokens=32, layout=Layout(groups=groups, num_shards=16, replicas=16, hot_replicas=16)
    )
    assert relieved.layer.stall_s == 0
    merged = step(tokens=32, layout=Layout(groups=groups, num_shards=16, num_clusters=1))
    assert merged.step_s < crowded.step_s / 4


def test_a_replica_of_the_hot_expert_relieves_it_alone() -> None:
    model = StepModel(SIZES, L4, FAST_NETWORK, Routing(8, 2, hot_share=0.9))
    batch = Batch(num_tokens=512, context=1)
    layout = Layout(groups=ONE_EXPERT_EACH, num_shards=4)
    busy = model.step(batch, layout).pod_busy_s
    hot = model.step(batch, replace(layout, hot_replicas=2)).pod_busy_s
    both = model.step(batch, replace(layout, hot_replicas=2, replicas=2)).pod_busy_s
    assert both <= hot < busy


def test_on_shared_cores_compute_adds_up_instead_of_overlapping() -> None:
    alone = Roofline(bandwidth=1e10, flops=1e11, launch_s=0.0)
    together = Roofline(bandwidth=1.5e10, flops=2e11, launch_s=0.0)
    machine = replace(L4, experts=alone, experts_together=together)
    layout = Layout(groups=((0, 1, 2, 3), (4, 5, 6, 7)))
    seen = step(machine=machine, tokens=32, layout=layout)
    # All eight experts are read at what the two workers reach together.
    assert seen.layer.expert_s == pytest.approx(8 * SIZES.slot_bytes / 1.5e10, rel=0.02)
    two = step(machine=machine, tokens=32, layout=replace(layout, num_micro_batches=2))
    assert two.step_s > 1.9 * seen.step_s  # both micro-batches read everything


def test_experts_in_process_send_no_frames() -> None:
    machine = replace(L4, host=replace(FREE, layer_s=1.0, frame_s=1.0, byte_s=1.0))
    network = Network(bandwidth=1.0, delay_s=1.0)
    seen = step(machine=machine, network=network, layout=Layout(groups=()))
    assert seen.layer.dispatch_s == seen.layer.wire_s == seen.layer.delay_s == 0.0
