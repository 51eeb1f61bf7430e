"""What the garbage collector need not look at."""

from __future__ import annotations

import gc


def freeze_heap() -> None:
    """Leave what has been made so far, mostly modules, out of collections from now on.

    For a process that is about to serve. A full collection stops all of its threads; with torch and
    Ray imported that takes a sixth of a second, and under load comes every few hundred requests.
    """
    gc.collect()
    gc.freeze()
