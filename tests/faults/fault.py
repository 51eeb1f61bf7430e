"""What a fault is: harm done to the scene and undone later, and what must be seen meanwhile."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from tests.faults.scene import Scene


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One occurrence of a fault. What it sees itself that must not be goes into `problems`, what
    is worth telling into `remarks`."""

    scene: Scene
    random: random.Random
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


Inject = Callable[[Trial], AbstractContextManager[None]]
"""Entering does the harm, leaving undoes it. Blocks; called on a thread of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """`row` is the row of the reliability table it belongs to. The bounds are the table's; None
    bounds nothing. `needs_no_replica`: every expert has one worker only. `is_refusal_right`: the
    load's own requests may be told to come again (429, 503)."""

    name: str
    row: str
    what: str
    inject: Inject
    hold_s: float = 6.0
    max_gap_s: float | None = None
    min_throughput: float | None = None
    needs_no_replica: bool = False
    is_refusal_right: bool = False
    is_for_soak: bool = True


MAX_GAP_S = 0.5
MIN_THROUGHPUT = 0.98
