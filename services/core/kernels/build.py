"""Builds the native code: `python -m services.core.kernels.build`.

One shared library without dependencies but the C++ runtime, of the kernels and of the lane, which
carries frames between shards and workers. A source file's name says for which
instruction set it is compiled (`dense_avx512_bf16.cpp`); the library picks at run time what the
processor has, so a build serves every machine of its architecture. The file's name has a digest of
the sources, so a stale build is never loaded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).parent
_CORE = FOLDER.parent
SOURCES = (FOLDER / "native", _CORE / "lane" / "native")
_COMMON_FLAGS = (
    *("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall"),
    # Or the compiler would fuse a product and a sum in one place and not in another.
    "-ffp-contract=off",
    f"-I{_CORE}",
)
_AVX512 = ("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
_ISA_FLAGS: dict[str, tuple[str, ...]] = {
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": _AVX512,
    "avx512_vnni": (*_AVX512, "-mavx512vnni"),
    "avx512_bf16": (*_AVX512, "-mavx512vnni", "-mavx512bf16"),
    "amx": (
        *_AVX512,
        *("-mavx512vnni", "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
    ),
}
_TIMEOUT_S = 600


class BuildError(Exception):
    """Says why the kernels could not be built; without them torch's own are used."""


def main() -> int:
    try:
        path = build()
    except BuildError as error:
        sys.stderr.write(f"kernels: not built, torch's are used instead: {error}\n")
        return 1
    sys.stdout.write(f"kernels: {path.name}\n")
    return 0


def library_path() -> Path:
    """Where the library built from the present sources lies, or would lie."""
    digest = hashlib.sha256()
    for path in [*_source_files("*"), Path(__file__)]:
        digest.update(path.name.encode() + path.read_bytes())
    return FOLDER / f"libexpertfleet-{platform.machine()}-{digest.hexdigest()[:12]}.so"


def build() -> Path:
    """Compile what is not there yet. Raises `BuildError`."""
    target = library_path()
    if target.exists():
        return target
    compiler = _compiler()
    with tempfile.TemporaryDirectory() as scratch:
        sources = [path for path in _source_files("*.cpp") if _is_for_this_machine(path)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(
                pool.map(lambda source: _compile(compiler, source, Path(scratch)), sources)
            )
        library = Path(scratch) / target.name
        _run([*compiler, "-shared", "-pthread", "-o", str(library), *map(str, objects)])
        for stale in FOLDER.glob("libexpertfleet-*.so"):
            stale.unlink()
        _move_into_place(library, target)
    return target


def _source_files(pattern: str) -> list[Path]:
    return [path for folder in SOURCES for path in sorted(folder.glob(pattern))]


def _move_into_place(library: Path, target: Path) -> None:
    """Atomically, as another process may be looking."""
    partial = target.with_suffix(f".{os.getpid()}")
    shutil.copy2(library, partial)
    partial.rename(target)


def _compiler() -> list[str]:
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return [path]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "c++"]
    raise BuildError("no C++ compiler; install g++ or clang, or the Python package ziglang")


def _isa_of(source: Path) -> str | None:
    names = sorted(_ISA_FLAGS, key=len, reverse=True)
    return next((name for name in names if source.stem.endswith(f"_{name}")), None)


def _is_for_this_machine(source: Path) -> bool:
    return _isa_of(source) is None or platform.machine() in ("x86_64", "AMD64")


def _compile(compiler: Sequence[str], source: Path, scratch: Path) -> Path:
    target = scratch / f"{source.parents[1].name}_{source.stem}.o"
    isa = _isa_of(source)
    flags = [*_COMMON_FLAGS, "-pthread", *(_ISA_FLAGS[isa] if isa else ())]
    if platform.machine() in ("x86_64", "AMD64"):
        flags.append("-DEXPERTFLEET_X86")
    _run([*compiler, *flags, "-c", str(source), "-o", str(target)])
    return target


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]}: {error}") from error
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stderr.strip()[-4000:]}")


if __name__ == "__main__":
    sys.exit(main())
