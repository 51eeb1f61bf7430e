"""The rooms of the house: imports point one way, and light processes stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LEAVES = (
    "router_service",
    "expert_service",
    "services.sessions",
    "services.gateway",
    "services.autoscaler",
)
ALLOWED: dict[str, tuple[str, ...]] = {
    "protos": ("protos",),
    "services.core": ("protos", "services.core"),
    **{leaf: ("protos", "services.core", leaf) for leaf in LEAVES},
    "services.cli": ("protos", "services.core", *LEAVES, "services.cli"),
}
ALLOWED["router_service"] += ("services.sessions",)
OURS = ("protos", "services", "router_service", "expert_service", "tests", "benchmarks", "models")


def _sources() -> Iterator[tuple[str, Path]]:
    for room in ALLOWED:
        for path in sorted((ROOT / room.replace(".", "/")).rglob("*.py")):
            yield room, path


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _is_within(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")


def test_imports_point_one_way() -> None:
    wrong = []
    for room, path in _sources():
        for module in _imports(path):
            if module.split(".")[0] not in OURS or module == "services":
                continue
            if not any(_is_within(module, allowed) for allowed in ALLOWED[room]):
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert wrong == []


def test_only_one_file_imports_ray() -> None:
    files = {
        str(path.relative_to(ROOT))
        for _, path in _sources()
        if any(_is_within(module, "ray") for module in _imports(path))
    }
    assert files == {"router_service/deployment.py"}


def test_transformers_is_no_run_time_dependency() -> None:
    users = [
        str(path.relative_to(ROOT))
        for _, path in _sources()
        if any(_is_within(module, "transformers") for module in _imports(path))
    ]
    assert users == []


def test_only_the_settings_read_the_environment() -> None:
    readers = {
        str(path.relative_to(ROOT))
        for _, path in _sources()
        if "os.environ[" in path.read_text()
        or "os.environ.get(" in path.read_text()
        or "os.getenv(" in path.read_text()
    }
    assert readers == set()


@pytest.mark.parametrize(
    "module",
    [
        "services.cli.main",
        "services.gateway.app",
        "services.autoscaler.run",
        "services.core.settings",
    ],
)
def test_light_processes_start_without_torch_and_ray(module: str) -> None:
    code = f"import {module}, sys; print([m for m in ('torch', 'ray') if m in sys.modules])"
    seen = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert seen.stdout.strip() == "[]"
