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
from torch import Tensor

from services.core.generation import SamplingParams

_FIRST_SORTED = 1024
_CHUNK = 256


def token_weights(scores: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Probabilities float32 [R, V] up to a factor per row: the likeliest token has 1, a filtered
    one 0. All temperatures are above 0.

    Temperature, then top-k, then top-p on what is left, then min-p, as in Hugging Face.
    """
    scaled = scores - scores.amax(-1, keepdim=True)
    scaled /= _column(scores, [p.temperature for p in params])
    _drop_below_top_k(scaled, [p.top_k for p in params])
    weights = scaled.exp_()
    _drop_below_top_p(weights, [p.top_p for p in params])
    if any(p.min_p > 0 for p in params):
        weights *= weights >= _column(scores, [p.min_p for p in params])
    return weights


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


def _in_chunks(weights: Tensor) -> Tensor:
    """[R, V] -> [R, C, chunk], padded with 0."""
    num_padded = -weights.shape[1] % _CHUNK
    if num_padded:
        weights = F.pad(weights, (0, num_padded))
    return weights.view(len(weights), -1, _CHUNK)


def _chunk_sums(chunks: Tensor) -> Tensor:
    """[R, C, chunk] -> [R, C]; the order in which a row is added depends on C only."""
    return chunks.sum(-1, dtype=torch.float64)


def _drop_below_top_k(scaled: Tensor, top_k: Sequence[int]) -> None:
    vocab_size = scaled.shape[1]
    chosen = [index for index, k in enumerate(top_k) if 0 < k < vocab_size]
    if not chosen:
        return
    rows = torch.tensor(chosen, device=scaled.device)
    last = torch.tensor([top_k[index] - 1 for index in chosen], device=scaled.device)
    largest = scaled[rows].topk(int(last.max()) + 1).values
    floor = torch.full_like(scaled[:, :1], float("-inf"))
    floor[rows] = largest.gather(1, last[:, None])
    scaled.masked_fill_(scaled < floor, float("-inf"))


def _drop_below_top_p(weights: Tensor, top_p: Sequence[float]) -> None:
    """Keep the likeliest tokens until their share reaches top_p, the one that reaches it too."""
    chosen = [index for index, p in enumerate(top_p) if p < 1.0]
    if not chosen:
        return
    rows = torch.tensor(chosen, device=weights.device)
    shares = _column(weights, [top_p[index] for index in chosen]).double()
    floor = torch.zeros_like(weights[:, :1])
    floor[rows] = _top_p_floor(weights[rows], shares)
    weights *= weights >= floor


def _top_p_floor(weights: Tensor, shares: Tensor) -> Tensor:
    """Smallest weight kept [R, 1]. Sorts a row whole only if its first tokens do not suffice."""
    wanted = shares * _chunk_sums(_in_chunks(weights)).cumsum(-1)[:, -1:]
    num_sorted = min(_FIRST_SORTED, weights.shape[1])
    floor, is_enough = _floor_among(weights.topk(num_sorted).values, wanted)
    rest = torch.nonzero(~is_enough)[:, 0]
    if len(rest) and num_sorted < weights.shape[1]:
        floor[rest] = _floor_among(_sorted_descending(weights[rest]), wanted[rest])[0]
    return floor


def _floor_among(ordered: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    sums = ordered.cumsum(-1, dtype=torch.float64)
    num_kept = ((sums - ordered) < wanted).sum(-1, keepdim=True).clamp_(min=1)
    return ordered.gather(1, num_kept - 1), (num_kept < ordered.shape[1])[:, 0]


def _sorted_descending(weights: Tensor) -> Tensor:
    if weights.device.type != "cpu":
        return weights.sort(-1, descending=True).values
    # Three times as fast as torch's, which also moves the indices.
    return torch.from_numpy(np.sort(weights.numpy(), -1)).flip(-1)


def _column(like: Tensor, values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]
