"""Which frames are computed next."""

from __future__ import annotations

from typing import Generic, TypeVar

T = TypeVar("T")


class FrameQueue(Generic[T]):
    """Frames by layer. The layer that has waited longest comes next, with all its frames.

    Frames that wait for the same weights are taken together, so that the weights are read from
    memory once for all of them. A layer's turn is that of its first frame: no frame starves.
    """

    def __init__(self) -> None:
        self._by_layer: dict[int, list[T]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._by_layer.values()))

    def add(self, layer: int, frame: T) -> None:
        self._by_layer.setdefault(layer, []).append(frame)

    def take(self) -> list[T]:
        """The next frames, oldest first, all of one layer; empty if nothing waits."""
        if not self._by_layer:
            return []
        return self._by_layer.pop(next(iter(self._by_layer)))
