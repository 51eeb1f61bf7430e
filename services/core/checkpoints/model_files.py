"""The files of a model, wherever they are: in a folder here, or fetched from a hub as needed."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Protocol

from services.core.checkpoints.safetensors_files import read_header
from services.core.errors import CheckpointError


class Progress(Protocol):
    """Told how far reading or downloading is. `what` is "reading weights" or names the download.

    `total_bytes` may grow while work is still being asked for.
    """

    def __call__(self, done_bytes: int, total_bytes: int, what: str, /) -> None: ...


class ModelFiles(Protocol):
    """`folder` holds the config, tokenizer and index files from the start."""

    @property
    def folder(self) -> Path: ...

    @property
    def names(self) -> Collection[str]:
        """File names of the model, there already or not."""
        ...

    def fetch(self, name: str) -> Path:
        """The file's path, once it is wholly there. Raises `CheckpointError` naming the file."""
        ...

    def tensor_names(self, name: str) -> Collection[str]:
        """Names of the tensors in a safetensors file, without fetching their data."""
        ...


class LocalFolder:
    """A folder that somebody filled. `CheckpointError` when it is empty or does not exist."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise CheckpointError(f"there is no folder {folder}", file=str(folder))
        self.folder = folder
        self.names = frozenset(path.name for path in folder.iterdir() if path.is_file())
        if not self.names:
            raise CheckpointError(
                f"the folder {folder} is empty; it must hold config.json and *.safetensors",
                file=str(folder),
            )

    def fetch(self, name: str) -> Path:
        path = self.folder / name
        if not path.is_file():
            raise CheckpointError(
                f"the file {name} is missing from {self.folder}; copy or download it again",
                file=str(path),
            )
        return path

    def tensor_names(self, name: str) -> Collection[str]:
        return read_header(self.fetch(name)).keys()
