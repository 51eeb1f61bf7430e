"""Mixtral's true widths on one GPU: in process, over gRPC, and transformers, beside the ceilings.

    python -m benchmarks.gpu [--wheels FOLDER] [--out docs/performance/gpu.md]

Runs where torch, transformers, grpcio and safetensors are and nothing can be fetched: what else the
product imports is installed from wheels in FOLDER into a temporary folder. Weights are random and
made on the device; of each model as many layers as fit twice, four at most. Ends within
`--seconds`, names what it left out, and writes Markdown, and JSON beside it. `--toy` runs all of
it at a toy size on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.gpu_report import to_markdown

ROOT = Path(__file__).parents[1]
WHEELS_FOR_PRODUCT = (
    "annotated-types",
    "googleapis-common-protos",
    "grpcio",
    "grpcio-health-checking",
    "grpcio-reflection",
    "opentelemetry-api",
    "opentelemetry-sdk",
    "opentelemetry-semantic-conventions",
    "prometheus-client",
    "protobuf",
    "pydantic",
    "pydantic-core",
    "pydantic-settings",
    "python-dotenv",
    "typing-extensions",
    "typing-inspection",
)


def main() -> int:
    arguments = _parser().parse_args()
    if arguments.wheels is not None:
        return _run_with_wheels(arguments.wheels)
    if arguments.out is None and not arguments.toy:
        arguments.out = ROOT / "docs" / "performance" / "gpu.md"
    try:
        _measure(arguments)
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"{error}; give --wheels a folder with wheels of {', '.join(WHEELS_FOR_PRODUCT)}"
        ) from error
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="wide-7b,wide-22b", help="wide-7b, wide-22b, bench-s")
    parser.add_argument("--batches", default="1,32,8,256,4,64,2,16,128", help="in this order")
    parser.add_argument("--prompts", default="512,2048", help="tokens of a prefilled prompt")
    parser.add_argument("--layers", type=int, default=4, help="at most")
    parser.add_argument("--workers", type=int, default=4, help="expert processes on the GPU")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8, help="decode steps of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=450.0, help="for everything")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install first")
    parser.add_argument("--out", type=Path, help="Markdown file; JSON is written beside it")
    parser.add_argument("--toy", action="store_true", help="a toy size on a CPU, in seconds")
    return parser


def _run_with_wheels(wheels: Path) -> int:
    """Install the folder's wheels that suit this Python beside it, and run again with them."""
    names = sorted({wheel.name.split("-")[0] for wheel in wheels.glob("*.whl")})
    with tempfile.TemporaryDirectory(prefix="expertfleet-wheels-") as site:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        install += ["--no-cache-dir", "--find-links", str(wheels), "--target", site, *names]
        subprocess.run(install, check=True)
        given = sys.argv[1:]
        at = next(i for i, word in enumerate(given) if word.startswith("--wheels"))
        del given[at : at + (1 if "=" in given[at] else 2)]
        paths = [site, str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        command = [sys.executable, "-m", "benchmarks.gpu", *given]
        return subprocess.run(command, env=environment, check=False).returncode


def _measure(arguments: argparse.Namespace) -> None:
    """Run all stages, writing what there is after each."""
    import torch

    device = _device(arguments)

    from benchmarks.gpu_compare import compare, kernel_tables, layers_that_fit
    from benchmarks.gpu_timing import Deadline, measure_ceilings

    deadline = Deadline(arguments.seconds)
    is_cuda = device.type == "cuda"
    extent = _extent(arguments)
    ceilings = measure_ceilings(
        device, num_bytes=2 << 30 if is_cuda else 1 << 24, matmul_size=8192 if is_cuda else 256
    )
    figures: dict[str, Any] = {
        "date": str(date.today()),
        "card": _card(device),
        "torch": torch.__version__,
        "arguments": "".join(f" {word}" for word in sys.argv[1:]),
        "ceilings": {
            "read_gb_per_s": ceilings.read_bytes_per_s / 1e9,
            "copy_gb_per_s": ceilings.copy_bytes_per_s / 1e9,
            "matmul_tflops": ceilings.matmul_flops / 1e12,
        },
        "models": [],
        "kernels": [],
        "skipped": deadline.skipped,
    }
    names = ["toy"] if arguments.toy else arguments.models.split(",")
    for place, name in enumerate(names):
        at_most = 2 if arguments.toy else arguments.layers
        layers = layers_that_fit(name, device, at_most=at_most, num_workers=extent.num_workers)
        if not layers:
            deadline.skipped.append(f"{name}: not even one layer fits twice on the device")
        elif deadline.allows(name, needs_s=30 if is_cuda else 0):
            # The kernel tables take a turn of their own at the end.
            own = deadline.share(len(names) - place + 1)
            _progress(f"{name}: {layers} layers, {own.remaining_s():.0f} s")
            figures["models"].append(compare(name, layers, device, ceilings, extent, own))
            deadline.skipped += [f"{name}: {what}" for what in own.skipped]
            _free(device)
        _write(figures, arguments.out, deadline)
    for name in names:
        if deadline.allows(f"kernels of {name}", needs_s=20 if is_cuda else 0):
            _progress(f"kernels of {name}, {deadline.remaining_s():.0f} s left")
            try:
                figures["kernels"].append(kernel_tables(name, device, ceilings, extent, deadline))
            except RuntimeError as error:
                deadline.skipped.append(f"kernels of {name}: {error}")
            _free(device)
            _write(figures, arguments.out, deadline)
    sys.stdout.write(to_markdown(figures))


def _write(figures: dict[str, Any], out: Path | None, deadline: Any) -> None:
    figures["seconds"] = round(deadline.elapsed_s(), 1)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(to_markdown(figures))
        out.with_suffix(".json").write_text(json.dumps(figures, indent=2) + "\n")


def _device(arguments: argparse.Namespace) -> Any:
    import torch

    if arguments.toy:
        torch.set_num_threads(1)  # at a toy size, waking threads is all there is to measure
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU here; --toy runs on a CPU")
    return torch.device("cuda", torch.device(arguments.device).index or 0)


def _extent(arguments: argparse.Namespace) -> Any:
    from benchmarks.gpu_compare import Extent

    if arguments.toy:
        return Extent(
            batches=(1, 4),
            prompts=(24,),
            kernel_rows=(1, 8),
            context=20,
            num_steps=2,
            num_rounds=1,
            num_workers=2,
        )
    return Extent(
        batches=_integers(arguments.batches),
        prompts=_integers(arguments.prompts),
        kernel_rows=(1, 4, 16, 64, 256, 2048),
        context=arguments.context,
        num_steps=arguments.steps,
        num_rounds=arguments.rounds,
        num_workers=arguments.workers,
    )


def _free(device: Any) -> None:
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _progress(text: str) -> None:
    sys.stderr.write(text + "\n")


def _card(device: Any) -> str:
    import torch

    if device.type != "cuda":
        return "a CPU (no figure of a GPU)"
    properties = torch.cuda.get_device_properties(device)
    return (
        f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute capability "
        f"{properties.major}.{properties.minor}, CUDA {torch.version.cuda}"
    )


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
