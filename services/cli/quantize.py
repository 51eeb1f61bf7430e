"""`expertfleet quantize`: write a checkpoint with int8 or int4 weights."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from services.core.errors import ConfigurationError
from services.core.quantization.formats import QuantizedFormat
from services.core.settings import load_settings

_FORMATS: dict[str, QuantizedFormat | None] = {"int8": "int8", "int4": "int4", "none": None}
_PROGRESS_EVERY_S = 2.0


def quantize(
    model: Annotated[str, typer.Argument(help="folder of a checkpoint, or a hub id")],
    out: Annotated[Path, typer.Argument(help="folder to write; must not exist")],
    expert_weights: Annotated[str, typer.Option(help="experts: int8, int4 or none")] = "int8",
    shard_weights: Annotated[
        str, typer.Option(help="attention and head: int8, int4 or none")
    ] = "none",
    search: Annotated[
        bool, typer.Option(help="int4: try several scales for every group of weights")
    ] = True,
    num_threads: Annotated[int | None, typer.Option(min=1, help="threads to use")] = None,
) -> None:
    """Write a quantised copy of a checkpoint, which `up` and `expert` serve like any other."""
    from services.core.checkpoints.checkpoint import Checkpoint
    from services.core.kernels.choice import set_num_threads
    from services.core.quantization.writer import QuantizationPlan, quantize_checkpoint

    threads = num_threads or load_settings().num_threads or len(os.sched_getaffinity(0))
    set_num_threads(threads)
    started = time.monotonic()
    checkpoint = Checkpoint.open(model)
    num_bytes = quantize_checkpoint(
        checkpoint,
        out,
        QuantizationPlan(experts=_format(expert_weights), shard=_format(shard_weights)),
        search=search,
        on_tensor=_Progress(),
    )
    sys.stderr.write(
        f"{out}: {num_bytes / 1e9:.2f} GB of weights from {checkpoint.bytes_read / 1e9:.2f} GB "
        f"in {time.monotonic() - started:.1f} s\n"
    )


class _Progress:
    """Told of every tensor, says so every few seconds."""

    def __init__(self) -> None:
        self._next = time.monotonic() + _PROGRESS_EVERY_S

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() >= self._next:
            sys.stderr.write(f"{done} of {total} tensors\n")
            self._next = time.monotonic() + _PROGRESS_EVERY_S


def _format(name: str) -> QuantizedFormat | None:
    if name not in _FORMATS:
        raise ConfigurationError(f"{name!r} is no format of weights; give int8, int4 or none")
    return _FORMATS[name]
