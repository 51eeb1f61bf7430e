"""Whether the native kernels are used."""

from __future__ import annotations

import functools

import torch

from services.core.kernels.library import Isa, NativeLibrary, native_library


def native_kernels_for(dtype: torch.dtype, device: torch.device) -> NativeLibrary | None:
    """The library where it has kernels for the dtype that beat torch's; None elsewhere."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return None
    library = _library()
    return library if library and library.active_isa() >= Isa.AVX2 else None


def kernels_name(dtype: torch.dtype, device: torch.device) -> str:
    """What computes linear layers, for logs: "native avx512_bf16" or "torch"."""
    library = native_kernels_for(dtype, device)
    return f"native {library.active_isa().name.lower()}" if library else "torch"


def set_num_threads(count: int, *, is_native: bool = False) -> None:
    """Threads for torch's operations on this thread, and for native kernels in this process.

    With `is_native`, for a thread whose large operations are all native, torch's own stay on the
    thread: after an operation OpenMP's threads spin for a while on the cores that the pool needs.
    """
    torch.set_num_threads(1 if is_native else count)
    if library := _library():
        library.set_num_threads(count)


@functools.cache
def _library() -> NativeLibrary | None:
    """With as many threads as torch has, until `set_num_threads` says otherwise."""
    library = native_library()
    if library is not None:
        library.set_num_threads(torch.get_num_threads())
    return library
