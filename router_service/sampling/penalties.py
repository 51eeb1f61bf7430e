"""What changes a row's logits before temperature: bias, penalties, tokens not allowed yet.

Shapes: R rows, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.core.generation import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRow:
    """One row of logits and what the next token of its sequence is drawn by.

    `position` is the index in the completion of the token being drawn; with `seed` (64 bits) it
    fixes the draw. `eos_token_ids` are the model's. Token ids are below V, save in `logit_bias`,
    `stop_token_ids` and `eos_token_ids`, where others have no effect.
    """

    params: SamplingParams
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    seed: int
    position: int
    eos_token_ids: tuple[int, ...] = ()

    @property
    def forbidden_token_ids(self) -> tuple[int, ...]:
        """Tokens that would end the completion before `min_tokens`."""
        if len(self.output_token_ids) >= self.params.min_tokens:
            return ()
        ends = () if self.params.ignore_eos else self.eos_token_ids
        return (*ends, *self.params.stop_token_ids)


def penalise(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Logits [R, V] after bias, repetition, frequency and presence penalty, and `min_tokens`.

    In this order, which is that of Hugging Face and vLLM. The input is not written to; it is
    returned as it is when no row asks for anything.
    """
    steps = (_add_bias, _divide_repeated, _subtract_counted, _forbid_ends)
    if not any(_is_changed(row) for row in rows):
        return logits
    scores = logits.clone()
    for step in steps:
        step(scores, rows)
    return scores


def _is_changed(row: SamplingRow) -> bool:
    params = row.params
    return bool(
        params.logit_bias
        or params.repetition_penalty != 1.0
        or params.frequency_penalty
        or params.presence_penalty
        or row.forbidden_token_ids
    )


def _add_bias(scores: Tensor, rows: Sequence[SamplingRow]) -> None:
    entries = _Entries()
    for index, row in enumerate(rows):
        bias = row.params.logit_bias
        entries.add(index, np.fromiter(bias, np.int64), np.fromiter(bias.values(), np.float64))
    where, amounts = entries.within(scores)
    scores[where] += amounts


def _divide_repeated(scores: Tensor, rows: Sequence[SamplingRow]) -> None:
    """CTRL's: a positive logit of a token seen is divided by the penalty, a negative multiplied."""
    entries = _Entries()
    for index, row in enumerate(rows):
        penalty = row.params.repetition_penalty
        if penalty != 1.0:
            for token_ids in (row.prompt_token_ids, row.output_token_ids):
                entries.add(index, np.asarray(token_ids, np.int64), penalty)
    where, penalties = entries.within(scores)
    seen = scores[where]
    scores[where] = torch.where(seen < 0, seen * penalties, seen / penalties)


def _subtract_counted(scores: Tensor, rows: Sequence[SamplingRow]) -> None:
    entries = _Entries()
    for index, row in enumerate(rows):
        frequency, presence = row.params.frequency_penalty, row.params.presence_penalty
        if frequency or presence:
            token_ids = np.asarray(row.output_token_ids, np.int64)
            token_ids, counts = np.unique(token_ids, return_counts=True)
            entries.add(index, token_ids, frequency * counts + presence)
    where, amounts = entries.within(scores)
    scores[where] -= amounts


def _forbid_ends(scores: Tensor, rows: Sequence[SamplingRow]) -> None:
    entries = _Entries()
    for index, row in enumerate(rows):
        entries.add(index, np.asarray(row.forbidden_token_ids, np.int64), float("-inf"))
    where, values = entries.within(scores)
    scores[where] = values


class _Entries:
    """Places (row, token) of a [R, V] tensor with a float each, gathered row by row."""

    def __init__(self) -> None:
        self._rows: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
        self._token_ids: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
        self._values: list[NDArray[np.float32]] = [np.empty(0, np.float32)]

    def add(
        self, row: int, token_ids: NDArray[np.int64], values: NDArray[np.floating[Any]] | float
    ) -> None:
        self._rows.append(np.full(len(token_ids), row, np.int64))
        self._token_ids.append(token_ids)
        self._values.append(np.broadcast_to(np.asarray(values, np.float32), token_ids.shape))

    def within(self, scores: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Index and values of the entries whose token is in the vocabulary."""
        rows, token_ids = np.concatenate(self._rows), np.concatenate(self._token_ids)
        is_known = (token_ids >= 0) & (token_ids < scores.shape[1])
        device = scores.device
        return (
            (
                torch.from_numpy(rows[is_known]).to(device),
                torch.from_numpy(token_ids[is_known]).to(device),
            ),
            torch.from_numpy(np.concatenate(self._values)[is_known]).to(device),
        )
