"""Whether sides compute the same model: their greedy tokens side by side."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.sides import SideSpec

LEAST_FIRST_SHARE = 0.5
"""In bfloat16, other summation orders flip an answer now and then, but not most of them."""

Answers = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """With the reference side, over prompts: the share whose first token is the same, and the mean
    share of tokens before the first that differs."""

    first_share: float
    prefix_share: float


class DisagreementError(Exception):
    """Two sides compute different models; names them."""


def check_agreement(
    sides: Sequence[SideSpec], answers: Mapping[str, Answers]
) -> dict[str, Agreement]:
    """Each side against the first of ours that is not quantised, or the first of all.

    Raises `DisagreementError` where ours in one weight format differ by a single token, where a
    bfloat16 side begins most answers otherwise than the reference, and where a quantised one
    begins all of them otherwise.
    """
    present = [side for side in sides if side.name in answers]
    exact = [side.name for side in present if side.is_ours and not side.is_quantised]
    reference = [*exact, *(side.name for side in present)][0]
    found = {}
    for side in present:
        mine = answers[side.name]
        twin = side.exactly_as
        if twin is not None and twin in answers and mine != answers[twin]:
            raise DisagreementError(f"{side.name} and {twin} answer with different tokens")
        found[side.name] = agreement = compare(answers[reference], mine)
        if agreement.first_share < LEAST_FIRST_SHARE and not (
            side.is_quantised and agreement.first_share > 0
        ):
            raise DisagreementError(
                f"{side.name} begins only {agreement.first_share:.0%} of the answers as "
                f"{reference} does: it computes another model"
            )
    return found


def compare(reference: Answers, answers: Answers) -> Agreement:
    shares = []
    for expected, tokens in zip(reference, answers, strict=True):
        same = 0
        for wanted, token in zip(expected, tokens, strict=True):
            if wanted != token:
                break
            same += 1
        shares.append(same / len(expected))
    return Agreement(
        first_share=statistics.mean(share > 0 for share in shares),
        prefix_share=statistics.mean(shares),
    )
