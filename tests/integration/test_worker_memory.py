"""What loading experts costs in memory beyond their weights, measured in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.random_checkpoint import RandomShape, write_random_checkpoint

ROOT = Path(__file__).parents[2]
SHAPE = RandomShape(
    hidden_size=3072,
    intermediate_size=12288,
    num_hidden_layers=1,
    num_attention_heads=8,
    num_key_value_heads=8,
    vocab_size=1000,
    num_local_experts=2,
)
MATRIX_BYTES = 3072 * 12288 * 2
"""75 MB: more than is packed at once."""

SCRIPT = """
import sys, threading
from pathlib import Path
import torch
from expert_service.allocator import map_blocks_from
from expert_service.held_experts import load_experts
from services.core.checkpoints.checkpoint import Checkpoint
from services.core.packed_linear import PackedLinear

def peak_bytes():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024

torch.set_num_threads(1)
cpu = torch.device("cpu")
PackedLinear(torch.ones(8, 8), dtype=torch.bfloat16, device=cpu)  # oneDNN itself
map_blocks_from(1 << 20)
checkpoint = Checkpoint.open(sys.argv[1])
Path("/proc/self/clear_refs").write_text("5")
before = peak_bytes()
held = load_experts(
    checkpoint, ((0, 1),), dtype=torch.bfloat16, device=cpu, cancelled=threading.Event()
)
print(checkpoint.bytes_read, held.weight_bytes, peak_bytes() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_an_expert_is_loaded_in_little_more_memory_than_its_weights(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, SHAPE, shard_bytes=200 << 20)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    bytes_read, weight_bytes, peak_bytes = map(int, done.stdout.split())
    print(f"peak is {peak_bytes / weight_bytes:.2f} of the weights")
    assert bytes_read == weight_bytes == 3 * MATRIX_BYTES
    assert weight_bytes <= peak_bytes <= 1.22 * weight_bytes
