"""A long sequence needs little memory beyond its keys and values, in prefill and in decode."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from services.core.kernels.choice import native_kernels_for

LENGTH = 8192
_SCRIPT = """
import asyncio, json, resource, sys
import torch
from tests.support.checkpoints import make_checkpoint
from tests.support.forward import HandEngine, HandSequence, Part
from pathlib import Path
from router_service.dispatch.local_experts import LocalExperts
from router_service.model.decoder import MixtralDecoder
from services.core.checkpoints.checkpoint import Checkpoint

torch.set_num_threads(1)
length = int(sys.argv[2])
folder = make_checkpoint(Path(sys.argv[1]), seed=7, hidden_size=64)
options = {"dtype": torch.bfloat16, "device": torch.device("cpu")}
checkpoint = Checkpoint.open(str(folder))
engine = HandEngine(
    MixtralDecoder.load(checkpoint, **options),
    LocalExperts.load(checkpoint, **options),
    block_size=16,
    num_blocks=length // 16 + 64,
)
engine.kv_cache.tensor.fill_(0)

def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

async def run():
    warm_up = HandSequence(token_ids=[3 + i % 250 for i in range(513)])
    await engine.step([Part(warm_up, 512, sample=())])
    await engine.step([Part(warm_up, 1)])
    sequence = HandSequence(token_ids=[3 + i % 250 for i in range(length)])
    before = peak_bytes()
    while sequence.num_computed < length - 4:
        count = min(512, length - 4 - sequence.num_computed)
        await engine.step([Part(sequence, count, sample=())])
    for _ in range(4):
        logits = await engine.step([Part(sequence, 1)])
    return {"grown_bytes": peak_bytes() - before, "is_finite": bool(logits.isfinite().all())}

print(json.dumps(asyncio.run(run())))
"""


@pytest.mark.skipif(
    native_kernels_for(torch.bfloat16, torch.device("cpu")) is None, reason="kernels are not built"
)
def test_eight_thousand_tokens_take_little_memory_beyond_their_blocks(tmp_path: Path) -> None:
    """3 MB were seen; copies of the keys, masks and an index for each key take 47 MB."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(tmp_path / "model"), str(LENGTH)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["is_finite"]
    assert result["grown_bytes"] < 16 << 20
