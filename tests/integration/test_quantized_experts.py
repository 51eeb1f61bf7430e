"""Quantised weights, stored or made at load: the same bits wherever the experts are."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.random_checkpoint import RandomShape, write_random_checkpoint
from expert_service.held_experts import load_experts
from router_service.dispatch.local_experts import LocalExperts
from router_service.experts import ExpertBackend
from router_service.model.decoder import MixtralDecoder
from services.core.checkpoints.checkpoint import Checkpoint
from services.core.placement import plan_placement
from services.core.quantization.formats import QUANTIZED_FORMATS, WeightsSetting
from services.core.quantization.writer import QuantizationPlan, quantize_checkpoint
from tests.support.checkpoints import fresh_seed, make_checkpoint
from tests.support.fleet import connected, running_workers
from tests.support.forward import HandEngine, HandSequence, Part

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
DTYPE = torch.bfloat16


async def all_logits(decoder: MixtralDecoder, experts: ExpertBackend, seed: int) -> Tensor:
    """Of a long prompt in chunks beside a short one that decodes, as bits."""
    generator = random.Random(seed)
    long, short = ([generator.randrange(3, 256) for _ in range(n)] for n in (60, 9))
    engine = HandEngine(decoder, experts, num_blocks=64, block_size=4)
    sequences = [HandSequence(token_ids=long), HandSequence(token_ids=short)]
    steps = (((0, 37), (1, 5)), ((0, 20), (1, 1)), ((0, 1), (1, 1)), ((0, 1), (1, 1)))
    logits = [
        await engine.step([Part(sequences[i], count, range(count)) for i, count in step])
        for step in steps
    ]
    return torch.cat(logits).view(torch.int32)


@pytest.mark.parametrize(("stored", "setting"), [(False, "int8"), (False, "int4"), (True, "auto")])
async def test_logits_have_the_same_bits_over_workers_and_in_process(
    tmp_path: Path, stored: bool, setting: WeightsSetting
) -> None:
    seed = fresh_seed()
    folder = make_checkpoint(tmp_path / "model", seed=seed, dtype=DTYPE, num_local_experts=8)
    if stored:
        plan = QuantizationPlan(experts="int4", shard="int8")
        quantize_checkpoint(Checkpoint.open(str(folder)), tmp_path / "quantized", plan)
        folder = tmp_path / "quantized"
    checkpoint = Checkpoint.open(str(folder))
    decoder = MixtralDecoder.load(checkpoint, dtype=DTYPE, device=CPU, shard_weights=setting)
    local = LocalExperts.load(checkpoint, dtype=DTYPE, device=CPU, expert_weights=setting)
    with torch.inference_mode():
        expected = await all_logits(decoder, local, seed)
        assert len(torch.unique(expected)) > expected.shape[1]
        for num_workers in (1, 2, 4):
            async with (
                running_workers(
                    folder, plan_placement(2, 8, num_workers), expert_weights=setting
                ) as endpoints,
                connected(checkpoint.config, endpoints, DTYPE) as remote,
            ):
                assert remote.slot_digests() == local.slot_digests()
                assert torch.equal(await all_logits(decoder, remote, seed), expected)


def test_quantizing_at_load_gives_the_bits_of_a_quantized_checkpoint(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", dtype=DTYPE)
    rows = torch.randn(9, 64).to(DTYPE)
    for weight_format in QUANTIZED_FORMATS:
        plan = QuantizationPlan(experts=weight_format, shard=None)
        quantize_checkpoint(Checkpoint.open(str(folder)), tmp_path / weight_format, plan)
        results = []
        stored: tuple[Path, WeightsSetting] = (tmp_path / weight_format, "auto")
        for source, setting in ((folder, weight_format), stored):
            held = load_experts(
                Checkpoint.open(str(source)),
                [(1, 2)],
                dtype=DTYPE,
                device=CPU,
                cancelled=threading.Event(),
                expert_weights=setting,
            )
            assert held.weight_format == weight_format
            results.append(held.layers[1][2].forward(rows))
        assert torch.equal(*results)


def test_replicas_in_different_formats_cannot_be_taken_for_each_other(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(str(make_checkpoint(tmp_path, dtype=DTYPE)))
    settings: tuple[WeightsSetting, ...] = ("auto", "int8", "int4")
    digests = {
        load_experts(
            checkpoint,
            [(0, 0)],
            dtype=DTYPE,
            device=CPU,
            cancelled=threading.Event(),
            expert_weights=setting,
        ).digests[0, 0]
        for setting in settings
    }
    assert len(digests) == 3


MEMORY_SCRIPT = """
import sys, threading
from pathlib import Path
import torch
from expert_service.allocator import map_blocks_from
from expert_service.held_experts import load_experts
from services.core.checkpoints.checkpoint import Checkpoint

def peak_bytes():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024

torch.set_num_threads(1)
map_blocks_from(1 << 20)
checkpoint = Checkpoint.open(sys.argv[1])
Path("/proc/self/clear_refs").write_text("5")
before = peak_bytes()
held = load_experts(
    checkpoint, ((0, 0),), dtype=torch.bfloat16, device=torch.device("cpu"),
    cancelled=threading.Event(), expert_weights="int4",
)
print(held.weight_bytes, peak_bytes() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_quantizing_at_load_needs_little_more_memory_than_the_result(tmp_path: Path) -> None:
    shape = RandomShape(
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=1000,
        num_local_experts=1,
        num_experts_per_tok=1,
    )
    write_random_checkpoint(tmp_path, shape)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    weight_bytes, peak_bytes = map(int, done.stdout.split())
    print(f"{weight_bytes} bytes of weights, peak {peak_bytes}")
    assert weight_bytes < 3 * 3072 * 8192 * 0.54
    assert peak_bytes < weight_bytes + (64 << 20)  # of bfloat16 it is 151 MB
