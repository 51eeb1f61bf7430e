"""From logits to the distribution a token is drawn from: temperature, top-k, top-p, min-p.

Every filter keeps all tokens as likely as the least likely one it keeps, so that tokens with equal
logits fare equally and no order among them matters. Each row's result is a function of that row.

Shapes: R rows, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor

from services.core.generation import SamplingParams

_CHUNK = 256


def token_weights(scores: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Probabilities float32 [R, V] up to a factor per row: the likeliest token has 1, a filtered
    one 0. All temperatures are above 0.

    Temperature, then top-k, then top-p on what is left, then min-p, as in Hugging Face.
    """
    scaled = scores - scores.amax(-1, keepdim=True)
    scaled /= _column(scores, [p.temperature for p in params])
    is_in_top_k = _mask_of_top_k(scaled, [p.top_k for p in params])
    weights = scaled.exp_()
    if is_in_top_k is not None:
        weights *= is_in_top_k
    floors = _column(scores, [p.min_p for p in params])
    _raise_to_top_p(floors, weights, [p.top_p for p in params])
    if floors.any():
        weights *= _at_least(weights, floors)
    return weights


def largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row [R, V], largest first, and where they are: [R, k] each; k <= V.

    They lie in the k chunks with the largest maxima, so most of a row is read only once.
    """
    num_rows, num_values = values.shape
    if k * _CHUNK >= num_values:
        top = values.topk(k)
        return top.values, top.indices
    chunks = _in_chunks(values, padding=float("-inf"))
    chunk_ids = chunks.amax(-1).topk(k).indices
    num_chunks = chunks.shape[1]
    first = torch.arange(num_rows, device=values.device)[:, None] * num_chunks
    picked = chunks.view(-1, _CHUNK).index_select(0, (first + chunk_ids).view(-1))
    top = picked.view(num_rows, -1).topk(k)
    where = chunk_ids.gather(1, top.indices // _CHUNK) * _CHUNK + top.indices % _CHUNK
    return top.values, where


def draw(weights: Tensor, uniforms: Sequence[float]) -> Tensor:
    """Inverse of the cumulative distribution in token order: int64 [R], never of weight 0.

    A uniform number picks the chunk of the vocabulary first, then the token in the chunk.
    """
    chunks = _in_chunks(weights)
    sums = _chunk_sums(chunks)
    points = torch.tensor(uniforms, dtype=torch.float64, device=weights.device)[:, None]
    chunk_ids, left = _invert(sums, points * sums.cumsum(-1)[:, -1:])
    picked = chunks.gather(1, chunk_ids[:, :, None].expand(-1, 1, _CHUNK))[:, 0]
    offsets, _ = _invert(picked.double(), left)
    return (chunk_ids * _CHUNK + offsets)[:, 0]


def _invert(weights: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """First index whose running sum exceeds the target [R, 1], and what of the target is left.

    Rounding can move a target below 0 or up to the total; it is kept between,
    so that the index found has weight.
    """
    running = weights.cumsum(-1)
    below_total = torch.nextafter(running[:, -1:], torch.zeros_like(targets))
    targets = torch.minimum(targets, below_total).clamp_(min=0.0)
    index = torch.searchsorted(running, targets, right=True).clamp_(max=weights.shape[1] - 1)
    return index, targets - (running.gather(1, index) - weights.gather(1, index))


def _in_chunks(values: Tensor, *, padding: float = 0.0) -> Tensor:
    """[R, V] -> [R, C, chunk]."""
    num_padded = -values.shape[1] % _CHUNK
    if num_padded:
        values = F.pad(values, (0, num_padded), value=padding)
    return values.view(len(values), -1, _CHUNK)


def _chunk_sums(chunks: Tensor) -> Tensor:
    """[R, C, chunk] -> [R, C]; the order in which a row is added depends on C only."""
    return chunks.sum(-1, dtype=torch.float64)


def _mask_of_top_k(scaled: Tensor, top_k: Sequence[int]) -> Tensor | None:
    """1 where a token is among the row's top k, or as likely as the last of them, else 0."""
    vocab_size = scaled.shape[1]
    chosen = [index for index, k in enumerate(top_k) if 0 < k < vocab_size]
    if not chosen:
        return None
    floors = torch.full_like(scaled[:, :1], float("-inf"))
    rows = torch.tensor(chosen, device=scaled.device)
    last = torch.tensor([top_k[index] - 1 for index in chosen], device=scaled.device)
    values, _ = largest(_select(scaled, chosen), int(last.max()) + 1)
    floors[rows] = values.gather(1, last[:, None])
    return _at_least(scaled, floors)


def _raise_to_top_p(floors: Tensor, weights: Tensor, top_p: Sequence[float]) -> None:
    """Keep the likeliest tokens until their share reaches top_p, the one that reaches it too."""
    chosen = [index for index, p in enumerate(top_p) if p < 1.0]
    if not chosen:
        return
    rows = torch.tensor(chosen, device=weights.device)
    shares = _column(weights, [top_p[index] for index in chosen]).double()
    wanted_from = _top_p_floors_cpu if weights.device.type == "cpu" else _top_p_floors
    found = wanted_from(_select(weights, chosen), shares)
    floors[rows] = torch.maximum(floors[rows], found)


def _top_p_floors(weights: Tensor, shares: Tensor) -> Tensor:
    """Smallest weight kept [R, 1]."""
    wanted = shares * _chunk_sums(_in_chunks(weights)).cumsum(-1)[:, -1:]
    ordered = weights.sort(-1, descending=True).values
    sums = ordered.cumsum(-1, dtype=torch.float64)
    num_kept = ((sums - ordered) < wanted).sum(-1, keepdim=True).clamp_(min=1)
    return ordered.gather(1, num_kept - 1)


def _top_p_floors_cpu(weights: Tensor, shares: Tensor) -> Tensor:
    """`_top_p_floors`, sorting only the tokens that may be kept.

    Tokens below (1 - p) * total / V weigh less than (1 - p) * total together, so what reaches p is
    among the others.
    """
    totals: list[float] = _chunk_sums(_in_chunks(weights)).cumsum(-1)[:, -1].tolist()
    floors = []
    rows: NDArray[np.float32] = weights.numpy()
    for row, total, share in zip(rows, totals, shares[:, 0].tolist(), strict=True):
        likely = row[row >= np.float32((1.0 - share) * total / len(row))]
        if not len(likely):  # the row is not finite; its draw is not used
            floors.append(0.0)
            continue
        likely.sort()
        ordered = likely[::-1]
        before = np.cumsum(ordered, dtype=np.float64) - ordered
        num_kept = max(1, int(np.count_nonzero(before < share * total)))
        floors.append(float(ordered[num_kept - 1]))
    return torch.tensor(floors)[:, None]


def _select(values: Tensor, rows: Sequence[int]) -> Tensor:
    if len(rows) == len(values):
        return values
    return values.index_select(0, torch.tensor(rows, device=values.device))


def _at_least(values: Tensor, floors: Tensor) -> Tensor:
    """1 or 0 as float32 [R, V]; several times as fast as going through a mask of bools."""
    return torch.ge(values, floors, out=torch.empty_like(values))


def _column(like: Tensor, values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]
