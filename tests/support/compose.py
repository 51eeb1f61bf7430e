"""The compose files, read as compose reads them: variables, overrides and profiles."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

yaml: Any = pytest.importorskip("yaml", reason="reading compose files needs PyYAML")

FOLDER = Path(__file__).parents[2] / "deploy/compose"
COMPOSE_FILE = FOLDER / "compose.yaml"
GPU_FILE = FOLDER / "compose.gpu.yaml"
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")

Service = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compose:
    services: Mapping[str, Service]
    """Those that start: without a profile, or with one that COMPOSE_PROFILES names."""
    all_services: Mapping[str, Service]
    volumes: Mapping[str, Any]


def load_compose(
    *files: Path, env_file: str = ".env", variables: Mapping[str, str] | None = None
) -> Compose:
    """`files` merged in order; `variables` are the shell's and win over `env_file`."""
    known = read_env_file(FOLDER / env_file) | dict(variables or {})
    merged: Any = {}
    for file in files or (COMPOSE_FILE,):
        merged = _merge(merged, _interpolate(yaml.safe_load(file.read_text()), known))
    profiles = set(filter(None, known.get("COMPOSE_PROFILES", "").split(",")))
    services: dict[str, Service] = merged["services"]
    active = {
        name: service
        for name, service in services.items()
        if not service.get("profiles") or profiles & set(service["profiles"])
    }
    return Compose(services=active, all_services=services, volumes=merged.get("volumes", {}))


def read_env_file(path: Path) -> dict[str, str]:
    lines = (line.strip() for line in path.read_text().splitlines())
    pairs = (line.partition("=") for line in lines if line and not line.startswith("#"))
    return {name: value for name, _, value in pairs}


def bind_mounts(service: Service) -> dict[str, Path]:
    """Target -> file or folder of the repository."""
    parts = [volume.split(":") for volume in service.get("volumes", [])]
    return {target: (FOLDER / source).resolve() for source, target, *_ in parts if "/" in source}


def _interpolate(value: Any, variables: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {name: _interpolate(each, variables) for name, each in value.items()}
    if isinstance(value, list):
        return [_interpolate(each, variables) for each in value]
    if isinstance(value, str):
        return _VARIABLE.sub(lambda found: variables.get(found[1]) or found[2] or "", value)
    return value


def _merge(below: Any, above: Any) -> Any:
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    merged = dict(below)
    for name, value in above.items():
        merged[name] = _merge(merged[name], value) if name in merged else value
    return merged
