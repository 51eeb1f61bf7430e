"""What a load test sends and when, drawn beforehand from a seed: pure bookkeeping."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from services.cli.load.lengths import Lengths

_FIRST_TOKEN_ID = 3
"""Below are, in all models of the family, the special tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """New tokens that a user adds, and how many an answer has at most."""

    token_ids: tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Its first turn is sent `at_s` seconds after the start (None: as soon as a place is free),
    each later one `think_s` after the answer before. `session_id` is None for single requests."""

    session_id: str | None
    at_s: float | None
    think_s: float
    turns: Sequence[Turn]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadShape:
    """`rate` is conversations per second, Poisson; None starts them as places become free."""

    num_conversations: int
    rate: float | None
    prompt_tokens: Lengths
    output_tokens: Lengths
    num_turns: int
    think_s: float
    vocab_size: int
    seed: int


def draw_workload(shape: WorkloadShape) -> list[Conversation]:
    """The same seed gives the same workload. Prompts are random, so no two share a prefix."""
    generator = random.Random(shape.seed)
    prefix = f"bench-{generator.getrandbits(48):012x}"
    conversations = []
    at_s = 0.0
    for number in range(shape.num_conversations):
        if shape.rate is not None:
            at_s += generator.expovariate(shape.rate)
        conversations.append(
            Conversation(
                session_id=f"{prefix}-{number}" if shape.num_turns > 1 else None,
                at_s=at_s if shape.rate is not None else None,
                think_s=shape.think_s,
                turns=[_draw_turn(shape, generator) for _ in range(shape.num_turns)],
            )
        )
    return conversations


def _draw_turn(shape: WorkloadShape, generator: random.Random) -> Turn:
    length = shape.prompt_tokens.draw(generator)
    return Turn(
        token_ids=tuple(
            generator.randrange(_FIRST_TOKEN_ID, shape.vocab_size) for _ in range(length)
        ),
        max_tokens=shape.output_tokens.draw(generator),
    )
