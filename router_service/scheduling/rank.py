"""Who comes first: the order in which sequences are admitted, prefilled and, from its end, evicted.

One order for all of it, fixed at arrival, so that what comes first is never evicted by what comes
after it, and therefore always finishes.
"""

from __future__ import annotations

from typing import Final

LEVEL_S: Final = 30.0
"""A level of priority is worth so many seconds of age. Of requests that come within that time the
more urgent go first, always; and no request is overtaken by one that comes more than
`LEVEL_S` times the difference of their priorities after it, so none starves."""

Rank = tuple[float, int]
"""The smaller, the earlier."""


def rank(*, arrived_at: float, priority: int, order: int, is_resumed: bool) -> Rank:
    """`arrived_at` in seconds of one monotonic clock; the lower the `priority`, the earlier.

    `order` is the order of arrival. A resumed request has waited once, on the shard that was lost,
    and its client is in the middle of an answer: it goes before new ones of its priority.
    """
    levels = priority - 1 if is_resumed else priority
    return arrived_at + LEVEL_S * levels, order
