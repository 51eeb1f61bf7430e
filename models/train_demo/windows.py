"""The token stream and the training windows cut from it."""

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor

from .tokenizer import BOS_ID, EOS_ID

Tokens = npt.NDArray[np.int64]


def encode_stream(tokenizer: Tokenizer, documents: Iterable[str]) -> Tokens:
    """All documents in one row, each between `<s>` and `</s>`."""
    encodings = tokenizer.encode_batch(list(documents))
    return np.concatenate([np.array([*encoding.ids, EOS_ID]) for encoding in encodings])


def anchors(tokenizer: Tokenizer, stream: Tokens) -> Tokens:
    """Positions where a window reads as a beginning: `<s>` and code at the left margin."""
    pieces = [tokenizer.decode([token_id]) for token_id in range(tokenizer.get_vocab_size())]
    ends_line = np.array([piece.endswith("\n") for piece in pieces])
    starts_code = np.array([piece[:1].strip() != "" for piece in pieces])
    at_margin = np.flatnonzero(ends_line[stream[:-1]] & starts_code[stream[1:]]) + 1
    return np.union1d(np.flatnonzero(stream == BOS_ID), at_margin)


class WindowSampler:
    """Endless shuffled epochs of windows led by `<s>`, starting at an anchor where one is near.

    Every epoch cuts the stream at another phase, so no token stays at the edge of its window.
    """

    def __init__(self, stream: Tokens, anchors: Tokens, context_length: int, seed: int) -> None:
        self._stream = stream
        self._anchors = anchors
        self._context_length = context_length
        self._rng = np.random.default_rng(seed)
        self._starts: Iterator[int] = iter(())

    def batch(self, batch_size: int) -> Tensor:
        """Token ids [B, T+1]: without the last column the inputs, without the first the targets."""
        return torch.from_numpy(
            np.stack([self._window(self._next_start()) for _ in range(batch_size)])
        )

    def _next_start(self) -> int:
        start = next(self._starts, None)
        if start is None:
            self._starts = iter(self._epoch())
            start = next(self._starts)
        return start

    def _epoch(self) -> list[int]:
        length = self._context_length
        cuts = np.arange(self._rng.integers(length), len(self._stream) - length, length)
        nearest = self._anchors[
            np.maximum(np.searchsorted(self._anchors, cuts, side="right") - 1, 0)
        ]
        is_near = (nearest <= cuts) & (cuts - nearest < length // 2)
        starts: list[int] = self._rng.permutation(np.where(is_near, nearest, cuts)).tolist()
        return starts

    def _window(self, start: int) -> Tokens:
        if self._stream[start] == BOS_ID:
            start += 1
        return np.concatenate(([BOS_ID], self._stream[start : start + self._context_length]))
