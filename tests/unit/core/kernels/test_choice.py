from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from services.core.kernels.choice import kernels_name, native_kernels_for, set_num_threads
from services.core.kernels.library import Isa, NativeLibrary
from tests.support.kernels import built_library, limited_to

CPU = torch.device("cpu")


@pytest.fixture
def library() -> Iterator[NativeLibrary]:
    library = built_library()
    native_kernels_for(torch.float32, CPU)  # the first use sets the threads
    num_threads, torchs_threads = library.num_threads(), torch.get_num_threads()
    yield library
    torch.set_num_threads(torchs_threads)
    library.set_num_threads(num_threads)


def test_the_kernels_are_native_on_a_cpu_with_vector_instructions(library: NativeLibrary) -> None:
    with limited_to(library, Isa.AVX2):
        for dtype in (torch.float32, torch.bfloat16):
            assert native_kernels_for(dtype, CPU) is library
            assert kernels_name(dtype, CPU) == "native avx2"


def test_the_kernels_are_torchs_for_other_dtypes_devices_and_processors(
    library: NativeLibrary,
) -> None:
    assert native_kernels_for(torch.float16, CPU) is None
    assert native_kernels_for(torch.bfloat16, torch.device("cuda")) is None
    with limited_to(library, Isa.PORTABLE):
        assert kernels_name(torch.bfloat16, CPU) == "torch"


def test_threads_are_set_for_torch_and_the_native_kernels(library: NativeLibrary) -> None:
    set_num_threads(2)
    assert (torch.get_num_threads(), library.num_threads()) == (2, 2)
    set_num_threads(2, is_native=True)
    assert (torch.get_num_threads(), library.num_threads()) == (1, 2)
