"""Choose the next token of every row.

The order is that of Hugging Face and vLLM: logit bias, repetition, frequency and presence penalty,
`min_tokens`; then, if the temperature is above 0, temperature, top-k, top-p, min-p and a draw;
else the likeliest token, of equals the one with the lowest id.

Shapes: R rows, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from router_service.sampling.draws import uniform
from router_service.sampling.filters import draw, largest, token_weights
from router_service.sampling.penalties import SamplingRow, penalise
from services.core.errors import NonFiniteError
from services.core.generation import TokenLogprob
from services.core.kernels.choice import native_kernels_for
from services.core.kernels.row_ops import greedy_tokens

__all__ = ["SampledToken", "Sampler", "SamplingRow"]

_ELEMENTS_IN_CACHE = 1 << 17


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledToken:
    """`logprob` is there if the row's `params.logprobs` is not None."""

    token_id: int
    logprob: TokenLogprob | None = None


class Sampler:
    """Stateless. A row's token depends on that row alone, not on the rows beside it."""

    def sample(
        self, logits: Tensor, rows: Sequence[SamplingRow]
    ) -> list[SampledToken | NonFiniteError]:
        """One result per row of logits float32 [R, V].

        A row that holds NaN or infinity, or in which no token is left, gives the error in its
        place; the others are not disturbed.
        """
        if not rows:
            return []
        scores = penalise(logits, rows)
        if scores is logits and all(_is_plain(row) for row in rows):
            plain = _greedy(logits, rows)
            if plain is not None:
                return plain
        token_ids = _likeliest(scores)
        is_sound = _is_finite(logits) & scores.gather(1, token_ids[:, None])[:, 0].isfinite()
        self._draw(scores, rows, token_ids)
        chosen = token_ids.tolist()
        logprobs = _logprobs(logits, rows, chosen)
        return [
            SampledToken(token_id=token_id, logprob=logprobs.get(index))
            if sound
            else _non_finite(logits[index], rows[index])
            for index, (token_id, sound) in enumerate(zip(chosen, is_sound.tolist(), strict=True))
        ]

    @staticmethod
    def _draw(scores: Tensor, rows: Sequence[SamplingRow], token_ids: Tensor) -> None:
        """Replace the likeliest by a drawn token where the temperature is above 0."""
        random = [index for index, row in enumerate(rows) if row.params.temperature > 0]
        num_at_once = len(rows)
        if scores.device.type == "cpu":
            num_at_once = max(1, _ELEMENTS_IN_CACHE // scores.shape[1])
        for start in range(0, len(random), num_at_once):
            part = random[start : start + num_at_once]
            where = torch.tensor(part, device=scores.device)
            chosen = scores.index_select(0, where)
            weights = token_weights(chosen, [rows[index].params for index in part])
            uniforms = [uniform(rows[index].seed, rows[index].position) for index in part]
            token_ids[where] = draw(weights, uniforms).clamp_(max=scores.shape[1] - 1)


def _is_plain(row: SamplingRow) -> bool:
    """Whether it asks for no more than the likeliest token."""
    return row.params.temperature <= 0 and row.params.logprobs is None


def _greedy(
    logits: Tensor, rows: Sequence[SamplingRow]
) -> list[SampledToken | NonFiniteError] | None:
    """In one native call, which at one row takes less than half the time; None without one."""
    library = native_kernels_for(logits.dtype, logits.device)
    if library is None or logits.dtype != torch.float32:
        return None
    token_ids, is_finite = greedy_tokens(library, logits)
    return [
        SampledToken(token_id=token_id) if is_sound else _non_finite(logits[index], rows[index])
        for index, (token_id, is_sound) in enumerate(zip(token_ids, is_finite, strict=True))
    ]


def _likeliest(scores: Tensor) -> Tensor:
    """int64 [R], of equals the first; numpy's is ten times as fast as torch's on a CPU."""
    if scores.device.type != "cpu":
        return scores.argmax(-1)
    return torch.from_numpy(scores.numpy().argmax(-1))


def _is_finite(logits: Tensor) -> Tensor:
    """bool [R]. A sum is not finite if a term is not; the few such rows are looked at closely."""
    is_finite = logits.sum(-1).isfinite()
    for index in torch.nonzero(~is_finite)[:, 0].tolist():
        is_finite[index] = logits[index].isfinite().all()
    return is_finite


def _non_finite(logits: Tensor, row: SamplingRow) -> NonFiniteError:
    num_bad = int((~logits.isfinite()).sum())
    if not num_bad:
        return NonFiniteError(
            f"no token may come at position {row.position}: logit_bias or min_tokens forbids all",
            where="sampling",
        )
    return NonFiniteError(
        f"{num_bad} of {len(logits)} logits at position {row.position} are NaN or infinite; the "
        f"token was not used. The weights or the dtype overflow: try bfloat16 or float32",
        where="logits",
    )


def _logprobs(
    logits: Tensor, rows: Sequence[SamplingRow], chosen: Sequence[int]
) -> dict[int, TokenLogprob]:
    """By row, for the rows that ask."""
    counts = {
        i: row.params.logprobs for i, row in enumerate(rows) if row.params.logprobs is not None
    }
    if not counts:
        return {}
    where = torch.tensor(list(counts), device=logits.device)
    log_probs = torch.log_softmax(logits.index_select(0, where), -1)
    own_ids = torch.tensor([chosen[index] for index in counts], device=logits.device)
    own_values = log_probs.gather(1, own_ids[:, None])[:, 0].tolist()
    top: list[list[tuple[int, float]]] = [[] for _ in counts]
    if most := min(max(counts.values()), logits.shape[1]):
        values, ids = (part.tolist() for part in largest(log_probs, most))
        top = [list(zip(*pair, strict=True)) for pair in zip(ids, values, strict=True)]
    return {
        index: TokenLogprob(
            token_id=chosen[index], logprob=own_values[place], top=tuple(top[place][:count])
        )
        for place, (index, count) in enumerate(counts.items())
    }
