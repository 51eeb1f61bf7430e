"""The native kernels as functions, or None where they were not built.

Pointers are those of contiguous CPU tensors; calls release the interpreter lock.
"""

from __future__ import annotations

import ctypes
import functools
from enum import IntEnum

from services.core.kernels.build import library_path


class Isa(IntEnum):
    """Instruction sets that kernels are written for; each has all that is below it."""

    PORTABLE = 0
    AVX2 = 1
    AVX512 = 2
    AVX512_VNNI = 3
    AVX512_BF16 = 4
    AMX = 5


class NativeLibrary:
    """A loaded library. `functions` has what other modules of this folder declare and call."""

    def __init__(self, functions: ctypes.CDLL) -> None:
        self.functions = functions
        functions.ef_set_num_threads.argtypes = [ctypes.c_int32]
        functions.ef_limit_isa.argtypes = [ctypes.c_int32]

    def set_num_threads(self, count: int) -> None:
        """Threads that one call may use, the caller's among them; for the whole process."""
        self.functions.ef_set_num_threads(count)

    def num_threads(self) -> int:
        return int(self.functions.ef_num_threads())

    def detected_isa(self) -> Isa:
        return Isa(self.functions.ef_detected_isa())

    def active_isa(self) -> Isa:
        return Isa(self.functions.ef_active_isa())

    def limit_isa(self, isa: Isa) -> None:
        """Use nothing above `isa`, for tests. Packed layouts are the same for all of them."""
        self.functions.ef_limit_isa(int(isa))


@functools.cache
def native_library() -> NativeLibrary | None:
    """The library built from the sources beside this file; None if it was not built."""
    path = library_path()
    return NativeLibrary(ctypes.CDLL(str(path))) if path.exists() else None
