"""Tells glibc's malloc which blocks get a memory mapping of their own."""

from __future__ import annotations

import ctypes

_M_MMAP_THRESHOLD = -3  # malloc.h


def map_blocks_from(num_bytes: int) -> None:
    """Blocks of this size and above go back to the system the moment they are freed.

    While weights are loaded that keeps unpacked matrices from leaving holes between packed ones;
    while frames are served reuse is faster, so the bound should then be above a frame. 32 MiB is
    the highest that glibc takes. Other C libraries are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, num_bytes)
