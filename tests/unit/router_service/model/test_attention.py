"""Attention by the native kernels and by torch, against a loop over visible keys."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from services.core.kernels.library import Isa, native_library
from tests.support.attention_scene import Scene
from tests.support.checkpoints import fresh_seed

_FLOATS = ctypes.POINTER(ctypes.c_float)
_COUNT = ctypes.c_int64
needs_native = pytest.mark.skipif(native_library() is None, reason="kernels are not built")
WAYS = [pytest.param(True, id="native", marks=needs_native), pytest.param(False, id="torch")]
MIXED = [(9, 1), (12, 5), (1, 1), (30, 1), (7, 7), (33, 2), (4, 1)]
LONG = [(1100, 1), (1300, 40), (513, 1), (512, 1), (77, 77), (700, 3)]
SHAPES = [(4, 2, 8), (3, 3, 24), (6, 1, 64), (2, 1, 256)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For torch, whose small operations are slower on several."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(params=[Isa.AMX, Isa.AVX512, Isa.AVX2, Isa.PORTABLE], ids=lambda isa: isa.name)
def isa(request: pytest.FixtureRequest) -> Iterator[Isa]:
    """Nothing above this instruction set is used; a lesser machine repeats what it has."""
    library = native_library()
    assert library is not None
    library.limit_isa(request.param)
    yield library.active_isa()
    library.limit_isa(Isa.AMX)


@pytest.mark.parametrize("native", WAYS)
@pytest.mark.parametrize("sliding_window", [None, 1, 3, 8, 100])
@pytest.mark.parametrize(
    "sequences",
    [
        pytest.param(MIXED, id="mixed"),
        pytest.param([(17, 1)], id="one decode"),
        pytest.param([(8, 1), (8, 1), (8, 1)], id="decodes of one length"),
        pytest.param([(3, 1), (20, 1), (11, 1)], id="decodes of several lengths"),
        pytest.param([(21, 21)], id="whole prompt"),
        pytest.param([(21, 6)], id="chunk"),
        pytest.param([(150, 131)], id="chunk of several slices"),
        pytest.param([(13, 13), (18, 4)], id="prefills"),
    ],
)
def test_attention_equals_a_loop_over_visible_keys(
    sequences: list[tuple[int, int]], sliding_window: int | None, native: bool
) -> None:
    scene = Scene(sequences, seed=fresh_seed())
    for sequence, output in enumerate(scene.attend(sliding_window, native=native)):
        expected = scene.expected(sequence, sliding_window)
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), SHAPES)
def test_every_instruction_set_and_head_size_is_right_over_several_splits_of_keys(
    isa: Isa, dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int
) -> None:
    scene = Scene(
        [(1, 1), (700, 1), (514, 4)],
        seed=fresh_seed(),
        dtype=dtype,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=16,
    )
    for window in (None, 530):
        for sequence, output in enumerate(scene.attend(window)):
            expected = scene.expected(sequence, window)
            error = (output.float() - expected).norm() / expected.norm()
            assert error < (2e-6 if dtype == torch.float32 else 8e-3)


@pytest.mark.parametrize("native", WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_within_two_percent(dtype: torch.dtype, native: bool) -> None:
    if native and dtype == torch.float16:
        pytest.skip("float16 is torch's")
    scene = Scene(MIXED, dtype=dtype, seed=fresh_seed())
    for sequence, output in enumerate(scene.attend(6, native=native)):
        assert output.dtype == dtype
        torch.testing.assert_close(
            output.float(), scene.expected(sequence, 6), atol=2e-2, rtol=2e-2
        )


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("sliding_window", "head_dim"), [(None, 64), (7, 24), (600, 64)])
def test_a_query_has_the_same_bits_alone_in_a_batch_and_in_any_chunk(
    isa: Isa, dtype: torch.dtype, sliding_window: int | None, head_dim: int
) -> None:
    scene = Scene(
        [(1040, 24), *LONG], dtype=dtype, seed=fresh_seed(), head_dim=head_dim, num_heads=6
    )
    together = scene.attend(sliding_window)
    for sequence, (length, count) in enumerate(scene.sequences):
        (alone,) = scene.part(sequence, length, count).attend(sliding_window)
        assert torch.equal(alone, together[sequence])
    for chunk in (1, 5, 23):
        for first in range(0, 24, chunk):
            stop = min(first + chunk, 24)
            (part,) = scene.part(0, 1040 - 24 + stop, stop - first).attend(sliding_window)
            assert torch.equal(part, together[0][first:stop])


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    library = native_library()
    assert library is not None
    before = library.num_threads()
    scenes = [[(3000, 1)], [(3000, 1)] * 20, [(900, 300)], LONG]
    try:
        for sequences in scenes:
            scene = Scene(sequences, dtype=dtype, seed=fresh_seed(), head_dim=64)
            results = []
            for count in (1, 2, 5):
                library.set_num_threads(count)
                results.append(torch.cat(scene.attend(None)))
            assert torch.equal(results[0], results[1])
            assert torch.equal(results[0], results[2])
    finally:
        library.set_num_threads(before)


@needs_native
def test_avx2_and_avx512_agree_in_float32() -> None:
    library = native_library()
    assert library is not None
    if library.detected_isa() < Isa.AVX512:
        pytest.skip("the processor has no AVX-512")
    scene = Scene(LONG, seed=fresh_seed(), head_dim=64)
    widest = torch.cat(scene.attend(600))
    library.limit_isa(Isa.AVX2)
    try:
        assert torch.equal(torch.cat(scene.attend(600)), widest)
    finally:
        library.limit_isa(Isa.AMX)


@needs_native
def test_exponentials_are_within_a_float_of_those_in_float64(isa: Isa) -> None:
    library = native_library()
    assert library is not None
    x = -np.random.default_rng(fresh_seed()).exponential(12.0, 200_000).astype(np.float32)
    x = np.concatenate([x[x > -87.3], np.array([0.0, -0.0, -1e-30, -87.29], dtype=np.float32)])
    got = x.copy()
    library.functions.ef_attention_exponentials(got.ctypes.data_as(_FLOATS), _COUNT(len(got)))
    exact = np.exp(x.astype(np.float64))
    assert np.abs(got / exact - 1).max() < 2.0**-23
    edge = np.array([-87.31, -200.0, -3e38, -np.inf, np.nan], dtype=np.float32)
    library.functions.ef_attention_exponentials(edge.ctypes.data_as(_FLOATS), _COUNT(5))
    assert np.array_equal(edge[:4], np.zeros(4))
    assert np.isnan(edge[4])


def test_torch_gives_a_sequence_about_the_same_beside_others_as_alone() -> None:
    scene = Scene(MIXED, seed=fresh_seed())
    for sequence, beside in enumerate(scene.attend(None, native=False)):
        (alone,) = scene.part(sequence, *MIXED[sequence]).attend(None, native=False)
        torch.testing.assert_close(alone, beside, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("native", WAYS)
def test_the_same_step_gives_the_same_bits(native: bool) -> None:
    seed = fresh_seed()
    first, second = (
        Scene(MIXED, dtype=torch.bfloat16, seed=seed).attend(5, native=native) for _ in range(2)
    )
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("native", WAYS)
@pytest.mark.parametrize("sliding_window", [None, 6])
def test_slots_of_others_and_slots_not_written_are_not_read(
    sliding_window: int | None, native: bool
) -> None:
    """Every slot that is not the sequences' own holds NaN in these scenes."""
    scene = Scene([(5, 1), (23, 1), (9, 3)], seed=fresh_seed())
    assert all(output.isfinite().all() for output in scene.attend(sliding_window, native=native))


@needs_native
def test_what_is_not_finite_reaches_the_queries_that_see_it() -> None:
    scene = Scene([(700, 2), (40, 1)], seed=fresh_seed(), dtype=torch.bfloat16)
    scene.keys[0][3] = float("nan")
    first, second = scene.attend(None)
    assert first.isnan().all()
    assert second.isfinite().all()
