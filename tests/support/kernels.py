"""The native kernels, built if they are not yet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from services.core.kernels.build import BuildError, build
from services.core.kernels.library import Isa, NativeLibrary, native_library


def built_library() -> NativeLibrary:
    """Skips the test where there is no compiler."""
    try:
        build()
    except BuildError as error:
        pytest.skip(str(error))
    library = native_library()
    assert library is not None, "native_library() was asked for before the kernels were built"
    return library


@contextmanager
def limited_to(library: NativeLibrary, isa: Isa) -> Iterator[None]:
    """Nothing above `isa` is used; skips the test where the processor lacks it."""
    if isa > library.detected_isa():
        pytest.skip(f"this processor has no {isa.name}")
    library.limit_isa(isa)
    try:
        yield
    finally:
        library.limit_isa(Isa.AMX)
