"""The sides that `make bench` knows, by name: what each runs, and what it needs to be there."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.side import weight_settings

SIDES = (
    "inprocess",
    "workers4",
    "workers2",
    "inprocess-int8",
    "workers4-int8",
    "vllm",
    "vllm-tp2",
    "transformers",
    "transformers-batching",
    "transformers-ep2",
    "llamacpp-bf16",
    "llamacpp-q8_0",
    "llamacpp-q4_0",
    "llamacpp-rpc2",
)
"""In the order of the tables. `workersN` takes any N, `-int8` may be `-int4`."""

GROUPS = (
    ("inprocess", "workers4", "workers2", "vllm", "vllm-tp2"),
    ("inprocess", "workers4", "workers2", "transformers", "transformers-ep2"),
    ("inprocess", "workers4-int8", "workers2", "llamacpp-q8_0", "llamacpp-rpc2"),
    ("inprocess", "inprocess-int8", "transformers-batching", "llamacpp-bf16", "llamacpp-q4_0"),
)
"""Sides that are loaded together: all of them at once, on bench-s, take more than 24 GiB."""

_OURS = re.compile(r"(inprocess|workers(?P<workers>\d+))(-(?P<weights>int8|int4))?")
_ALLOCATORS = ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4")
_LIBRARIES = (Path("/usr/lib/x86_64-linux-gnu"), Path("/usr/lib/aarch64-linux-gnu"))


class SideUnavailableError(Exception):
    """A side cannot run here; says why and what would help."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Folders: the peers' environments, and what is made once and kept between runs."""

    peers: Path
    models: Path
    cache: Path

    @classmethod
    def under(cls, root: Path) -> Places:
        root = root.resolve()
        return cls(peers=root, models=root / "models", cache=root / "cache")

    def python(self, peer: str) -> Path:
        """A peer's interpreter. Raises `SideUnavailableError` when it is not installed."""
        python = self.peers / peer / "bin" / "python"
        if not python.exists():
            raise SideUnavailableError(
                f"not installed: `python -m benchmarks.peers install {peer}` does it"
            )
        return python


@dataclass(frozen=True, slots=True, kw_only=True)
class SideSpec:
    """How to start a side. `exactly_as` names ours that must answer with the same tokens as it."""

    name: str
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    is_ours: bool = False
    is_quantised: bool = False
    exactly_as: str | None = None


def is_ours(name: str) -> bool:
    return _OURS.fullmatch(name) is not None


def is_side(name: str) -> bool:
    return name in _PEERS or is_ours(name)


def side_spec(name: str, model: Path, places: Places) -> SideSpec:
    """`name` is a side. Raises `SideUnavailableError` where it cannot run."""
    if found := _OURS.fullmatch(name):
        return _ours(name, model, found["workers"], found["weights"])
    return _PEERS[name](name, model, places)


def _ours(name: str, model: Path, workers: str | None, weights: str | None) -> SideSpec:
    if weights and not weight_settings(weights):
        raise SideUnavailableError(f"there is no setting for {weights} weights")
    command = [sys.executable, "-m", "benchmarks.side"]
    command += ["workers" if workers else "inprocess", str(model)]
    command += ["--workers", workers] if workers else []
    command += ["--weights", weights] if weights else []
    return SideSpec(
        name=name,
        command=tuple(command),
        is_ours=True,
        is_quantised=weights is not None,
        exactly_as=f"inprocess-{weights}" if weights else "inprocess",
    )


def _transformers(name: str, model: Path, places: Places) -> SideSpec:
    flags = {
        "transformers": (),
        "transformers-batching": ("--batching",),
        "transformers-ep2": ("--expert-parallel", "2"),
    }[name]
    module = ("-m", "benchmarks.peers.transformers_side", str(model))
    return SideSpec(name=name, command=(sys.executable, *module, *flags))


def _vllm(name: str, model: Path, places: Places) -> SideSpec:
    python = places.python("vllm")
    cores = sorted(os.sched_getaffinity(0))
    num_processes = 2 if name == "vllm-tp2" else 1
    if num_processes > len(cores):
        raise SideUnavailableError(f"{num_processes} processes need as many cores")
    share = len(cores) // num_processes
    bindings = [
        ",".join(map(str, cores[rank * share : (rank + 1) * share]))
        for rank in range(num_processes)
    ]
    # Its documentation asks for Intel's OpenMP and tcmalloc, preloaded.
    preloaded = [python.parent.parent / "lib" / "libiomp5.so"]
    preloaded += [folder / file for folder in _LIBRARIES for file in _ALLOCATORS]
    command = (str(python), "-m", "benchmarks.peers.vllm_side", str(model))
    parallel = ("--tensor-parallel", "2", "--eager") if num_processes > 1 else ()
    return SideSpec(
        name=name,
        command=(*command, *parallel),
        environment={
            "LD_PRELOAD": ":".join(str(file) for file in preloaded if file.exists()),
            "OMP_NUM_THREADS": str(share),
            "VLLM_CPU_OMP_THREADS_BIND": "|".join(bindings),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CACHE_ROOT": str(places.cache / "vllm"),
            "TORCHINDUCTOR_CACHE_DIR": str(places.cache / "inductor"),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        },
    )


def _llamacpp(name: str, model: Path, places: Places) -> SideSpec:
    weights = "bf16" if name == "llamacpp-rpc2" else name.removeprefix("llamacpp-")
    places.models.mkdir(parents=True, exist_ok=True)
    command = [str(places.python("llamacpp")), "-m", "benchmarks.peers.llamacpp_side", str(model)]
    command += ["--weights", weights]
    command += ["--gguf", str(places.models / f"{model.name}.{weights}.gguf")]
    command += ["--rpc-servers", "2"] if name == "llamacpp-rpc2" else []
    return SideSpec(name=name, command=tuple(command), is_quantised=weights != "bf16")


_PEERS: dict[str, Callable[[str, Path, Places], SideSpec]] = {
    "vllm": _vllm,
    "vllm-tp2": _vllm,
    "transformers": _transformers,
    "transformers-batching": _transformers,
    "transformers-ep2": _transformers,
    "llamacpp-bf16": _llamacpp,
    "llamacpp-q8_0": _llamacpp,
    "llamacpp-q4_0": _llamacpp,
    "llamacpp-rpc2": _llamacpp,
}
