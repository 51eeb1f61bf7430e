"""Matrices that are taken run by run, so that they need not be in memory whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor


class RowSource(Protocol):
    """A matrix [O, I] that is sliced by rows: a tensor, or one that is read as it is sliced."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def __getitem__(self, rows: slice, /) -> Tensor: ...


class LazyRows:
    """A `RowSource` whose every slice is read anew, by `read(first row, number of rows)`."""

    def __init__(self, shape: tuple[int, int], read: Callable[[int, int], Tensor]) -> None:
        self.shape = shape
        self._read = read

    def __getitem__(self, rows: slice, /) -> Tensor:
        first, stop, _ = rows.indices(self.shape[0])
        return self._read(first, stop - first)
