"""Which experts the gate chose for each token of one sequence, until that has been told."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class ChoiceRecord:
    """The choices of a sequence's leading tokens, each kept from its first computation on.

    The first `num_known` tokens were told by another shard and are not held here. A token that is
    computed again, after a preemption, keeps the choices that it has.
    """

    __slots__ = ("_first_held", "_rows", "num_tokens")

    def __init__(self, num_known: int = 0) -> None:
        self.num_tokens = num_known
        """Leading tokens whose choices are known: the KV of these need not be computed again."""
        self._first_held = num_known
        self._rows: list[NDArray[np.uint8]] = []

    def add(self, start: int, rows: NDArray[np.uint8]) -> None:
        """Note `rows` [t, layers, k] of the tokens from `start` on, which leave no gap."""
        assert start <= self.num_tokens, f"choices from {start} on, known are {self.num_tokens}"
        fresh = rows[self.num_tokens - start :]
        if len(fresh):
            self._rows.append(fresh)
            self.num_tokens += len(fresh)

    def adopt(self, leader: ChoiceRecord, num_tokens: int) -> None:
        """Take over what `leader` holds of the first `num_tokens`, whose KV is shared with it."""
        if leader._first_held == 0 and self.num_tokens < num_tokens:
            told = np.concatenate(leader._rows)[self.num_tokens : num_tokens]
            self.add(self.num_tokens, told)

    def take(self) -> bytes:
        """All that was noted and not yet taken, as uint8 [t, layers, k]."""
        taken = b"".join(rows.tobytes() for rows in self._rows)
        self._rows.clear()
        self._first_held = self.num_tokens
        return taken
