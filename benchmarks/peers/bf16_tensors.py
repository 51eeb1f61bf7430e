"""bfloat16 tensors of a safetensors checkpoint as float32 arrays, with numpy alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    file: Path
    offset: int
    shape: tuple[int, ...]


class Bf16Tensors:
    """All tensors of the `*.safetensors` files in a folder, by name; read one by one.

    Raises `ValueError` for a tensor of another dtype and `KeyError` for one that is not there.
    """

    def __init__(self, folder: Path) -> None:
        self._places: dict[str, _Place] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with file.open("rb") as stream:
                header_bytes = int.from_bytes(stream.read(8), "little")
                header: dict[str, Any] = json.loads(stream.read(header_bytes))
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                if entry["dtype"] != "BF16":
                    raise ValueError(f"{file}: {name} is {entry['dtype']}, only BF16 can be read")
                self._places[name] = _Place(
                    file=file,
                    offset=8 + header_bytes + entry["data_offsets"][0],
                    shape=tuple(entry["shape"]),
                )

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name].shape

    def read(self, name: str) -> NDArray[np.float32]:
        """A bfloat16 is the upper half of the float32 of the same value."""
        place = self._places[name]
        bits = np.memmap(place.file, dtype="<u2", mode="r", offset=place.offset, shape=place.shape)
        return (bits.astype(np.uint32) << 16).view(np.float32)
