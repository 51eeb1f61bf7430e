"""What reading a checkpoint costs in memory, measured in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.random_checkpoint import RandomShape, write_random_checkpoint

ROOT = Path(__file__).parents[2]
SHAPE = RandomShape(
    hidden_size=1024,
    intermediate_size=6144,
    num_hidden_layers=1,
    num_attention_heads=8,
    num_key_value_heads=8,
    vocab_size=1000,
)
EXPERT_BYTES = 3 * 1024 * 6144 * 2

SCRIPT = """
import sys
from pathlib import Path
from services.core.checkpoints.checkpoint import Checkpoint

def peak_bytes():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024

checkpoint = Checkpoint.open(sys.argv[1])
Path("/proc/self/clear_refs").write_text("5")
before = peak_bytes()
weights = [checkpoint.expert(0, expert) for expert in (1, 2, 5)]
print(checkpoint.bytes_read, peak_bytes() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_peak_memory_is_the_weights_read_and_little_more(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, SHAPE, shard_bytes=200 << 20)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    bytes_read, peak_bytes = map(int, done.stdout.split())
    assert bytes_read == 3 * EXPERT_BYTES
    assert bytes_read <= peak_bytes <= 1.1 * bytes_read
