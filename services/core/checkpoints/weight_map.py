"""Which file of a checkpoint holds which tensor."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from services.core.checkpoints.json_fields import read_json_object
from services.core.checkpoints.model_files import ModelFiles
from services.core.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightMap:
    """`files` is file name by stored tensor name; `origin` is where that was read."""

    files: dict[str, str]
    origin: Path


def read_weight_map(model: ModelFiles) -> WeightMap:
    """From the index file, else from the headers of the weight files.

    The hub's layout is preferred to Mistral's where a repository carries both. Raises
    `CheckpointError` when there are no weights, the index is corrupt, or two files hold a tensor
    of the same name.
    """
    for stem in ("model", "consolidated"):
        index = f"{stem}.safetensors.index.json"
        if index in model.names:
            return _from_index(model.fetch(index))
        if names := _weight_files(model.names, f"{stem}*.safetensors"):
            return _from_headers(model, names)
    if names := _weight_files(model.names, "*.safetensors"):
        return _from_headers(model, names)
    raise CheckpointError(
        f"{model.folder} holds no weights: neither model*.safetensors nor "
        f"consolidated*.safetensors{_other_formats(model.names)}",
        file=str(model.folder),
    )


def _weight_files(names: Collection[str], pattern: str) -> list[str]:
    return sorted(name for name in names if fnmatchcase(name, pattern))


def _from_index(path: Path) -> WeightMap:
    files = read_json_object(path).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise CheckpointError(
            f"{path} has no weight_map of tensor names to file names", file=str(path)
        )
    if foreign := [name for name in files.values() if Path(name).name != name]:
        raise CheckpointError(
            f"{path} names the file {foreign[0]!r}, which is not beside it", file=str(path)
        )
    return WeightMap(files=files, origin=path)


def _from_headers(model: ModelFiles, names: list[str]) -> WeightMap:
    if len(names) == 1:
        model.fetch(names[0])
    files: dict[str, str] = {}
    for name in names:
        for tensor in model.tensor_names(name):
            if tensor in files:
                raise CheckpointError(
                    f"{model.folder}: both {files[tensor]} and {name} hold tensor {tensor}; "
                    "tensor-parallel slices are not read, and other weights must lie elsewhere",
                    file=name,
                    tensor=tensor,
                )
            files[tensor] = name
    origin = model.folder / names[0] if len(names) == 1 else model.folder
    return WeightMap(files=files, origin=origin)


def _other_formats(names: Collection[str]) -> str:
    others = sorted(n for n in names if n.endswith((".bin", ".pt", ".pth", ".gguf")))
    return f". {others[0]} is of a format that is not read: convert it" if others else ""
