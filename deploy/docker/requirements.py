"""What the images install: `requirements.py FOLDER` writes torch.txt, expert.txt and serve.txt.

From pyproject.toml, pinned by constraints.txt. Run while the images are built, and by tests; needs
nothing but Python.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

EXPERT = frozenset(
    {
        "grpcio",
        "grpcio-health-checking",
        "grpcio-reflection",
        "huggingface-hub",
        "numpy",
        "opentelemetry-exporter-otlp-proto-grpc",
        "opentelemetry-sdk",
        "prometheus-client",
        "protobuf",
        "psutil",
        "pydantic",
        "pydantic-settings",
        "redis",
        "torch",
        "uvloop",
    }
)
"""Distributions that a worker, its probe and the fetching of weights import."""


def main() -> None:
    root, folder = Path.cwd(), Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    requirements = all_requirements(root)
    _write(folder / "torch.txt", [pinned_torch(root)])
    _write(folder / "expert.txt", [each for each in requirements if name_of(each) in EXPERT])
    _write(folder / "serve.txt", requirements)


def all_requirements(root: Path) -> list[str]:
    """The run-time requirements of the project in the folder `root`."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    return list(project["dependencies"])


def pinned_torch(root: Path) -> str:
    """A layer of its own, as it is most of an image and seldom changes."""
    lines = (root / "constraints.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith("torch=="))


def name_of(requirement: str) -> str:
    """`redis[hiredis]>=7.0` is redis."""
    return re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def _write(path: Path, lines: list[str]) -> None:
    path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
