from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from router_service.dispatch.dispatch_plan import all_assignments, group_by_expert
from services.core.expert_ffn import (
    Assignments,
    MoeInput,
    PackedExpert,
    moe_forward,
    moe_forward_each,
)
from services.core.kernels.choice import native_kernels_for
from services.core.kernels.library import Isa, NativeLibrary
from services.core.kernels.moe import NativeLayer
from services.core.quantization.formats import QuantizedFormat
from tests.support.checkpoints import fresh_seed
from tests.support.frames import random_assignments, random_weights
from tests.support.kernels import built_library, limited_to
from tests.support.moe_layers import random_gate

HIDDEN, INTERMEDIATE, NUM_EXPERTS = 72, 100, 5
CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)
NATIVE_ISAS = [isa for isa in Isa if isa >= Isa.AVX2]


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(fresh_seed())


@pytest.fixture
def library() -> Iterator[NativeLibrary]:
    library = built_library()
    if native_kernels_for(torch.bfloat16, CPU) is None:
        pytest.skip("torch's kernels are preferred on this processor")
    num_threads, torchs_threads = library.num_threads(), torch.get_num_threads()
    torch.set_num_threads(1)
    yield library
    torch.set_num_threads(torchs_threads)
    library.set_num_threads(num_threads)


@pytest.fixture(params=NATIVE_ISAS, ids=lambda isa: isa.name.lower())
def isa(library: NativeLibrary, request: pytest.FixtureRequest) -> Iterator[Isa]:
    with limited_to(library, request.param):
        yield request.param


def frame_of(
    generator: torch.Generator, num_tokens: int, dtype: torch.dtype, *, combine: bool = True
) -> MoeInput:
    return MoeInput(
        hidden_states=torch.randn(num_tokens, HIDDEN, generator=generator).to(dtype),
        assignments=random_assignments(
            generator, num_tokens=num_tokens, expert_ids=range(NUM_EXPERTS)
        ),
        combine=combine,
    )


def random_experts(
    generator: torch.Generator, dtype: torch.dtype
) -> tuple[dict[int, PackedExpert], dict[int, PackedExpert]]:
    """The same experts, with native kernels and with torch's."""
    weights = [
        random_weights(generator, hidden=HIDDEN, intermediate=INTERMEDIATE, dtype=dtype)
        for _ in range(NUM_EXPERTS)
    ]
    native, torchs = (
        {
            expert: PackedExpert(weight, dtype=dtype, device=CPU, native=is_native)
            for expert, weight in enumerate(weights)
        }
        for is_native in (True, False)
    )
    assert all(expert.native is not None for expert in native.values())
    assert all(expert.native is None for expert in torchs.values())
    return native, torchs


@pytest.mark.parametrize("combine", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_layer_equals_torchs_within_rounding(
    isa: Isa, generator: torch.Generator, dtype: torch.dtype, tolerance: float, combine: bool
) -> None:
    native, torchs = random_experts(generator, dtype)
    for num_tokens in (1, 2, 19, 140):
        frame = frame_of(generator, num_tokens, dtype, combine=combine)
        (result,), (expected,) = (moe_forward_each(e, [frame]) for e in (native, torchs))
        assert result.dtype == dtype
        scale = expected.abs().max()
        assert float((result.double() - expected.double()).abs().max() / scale) < tolerance


def test_roundings_are_torchs_bit_for_bit_where_sums_are_exact(
    isa: Isa, generator: torch.Generator
) -> None:
    """Sums of few short numbers do not depend on their order; then only the roundings are left."""
    native, torchs = ({}, {})
    for expert in range(NUM_EXPERTS):
        weights = SimpleNamespace(
            w1=_integers(generator, (INTERMEDIATE, HIDDEN), 8) / 8,
            w3=_integers(generator, (INTERMEDIATE, HIDDEN), 60) / 64,
            w2=_two_ones_a_row(generator, (HIDDEN, INTERMEDIATE)),
        )
        native[expert] = PackedExpert(weights, dtype=torch.bfloat16, device=CPU)
        torchs[expert] = PackedExpert(weights, dtype=torch.bfloat16, device=CPU, native=False)
    hidden_states = _integers(generator, (33, HIDDEN), 2).to(torch.bfloat16)
    hidden_states *= torch.rand(hidden_states.shape, generator=generator) < 0.2
    assignments = random_assignments(generator, num_tokens=33, expert_ids=range(NUM_EXPERTS))
    for combine in (True, False):
        frame = MoeInput(hidden_states=hidden_states, assignments=assignments, combine=combine)
        (result,), (expected,) = (moe_forward_each(e, [frame]) for e in (native, torchs))
        assert torch.equal(result, expected)
        assert result.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top_k", [1, 2, NUM_EXPERTS])
def test_all_experts_as_the_gate_chose_give_the_bits_of_their_assignments(
    isa: Isa, generator: torch.Generator, dtype: torch.dtype, top_k: int
) -> None:
    experts, _ = random_experts(generator, dtype)
    layer = NativeLayer([one for e in experts.values() if (one := e.native) is not None])
    for num_tokens in (0, 1, 3, 1300):
        hidden_states = torch.randn(num_tokens, HIDDEN, generator=generator).to(dtype)
        ids, weights = random_gate(
            generator, num_tokens=num_tokens, num_experts=NUM_EXPERTS, top_k=top_k
        )
        gated = group_by_expert(ids, weights, NUM_EXPERTS)
        expected = moe_forward(experts, hidden_states, all_assignments(gated), combine=True)
        apart = torch.cat([hidden_states, hidden_states], dim=1)[:, :HIDDEN]
        for rows in (hidden_states, apart):
            output, rows_per_expert = layer.forward(rows, ids, weights)
            assert torch.equal(output, expected)
            assert rows_per_expert.tolist() == gated.rows_per_expert.tolist()
    with pytest.raises(ValueError, match="not of 72"):
        layer.forward(torch.zeros(1, 71, dtype=dtype), ids[:1], weights[:1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_has_the_same_bits_alone_and_in_any_frames_on_any_number_of_threads(
    isa: Isa, library: NativeLibrary, generator: torch.Generator, dtype: torch.dtype
) -> None:
    native, _ = random_experts(generator, dtype)
    frames = [frame_of(generator, num_tokens, dtype) for num_tokens in (1, 40, 1200, 7)]
    library.set_num_threads(1)
    merged = moe_forward_each(native, frames)
    for frame, outputs in zip(frames, merged, strict=True):
        library.set_num_threads(3)
        (again,) = moe_forward_each(native, [frame])
        assert torch.equal(again, outputs)
        for token in torch.randint(len(outputs), (3,), generator=generator).tolist():
            (alone,) = moe_forward_each(native, [_only(frame, token)])
            assert torch.equal(alone[0], outputs[token])


def test_experts_of_one_layer_may_be_held_in_several_formats(
    library: NativeLibrary, generator: torch.Generator
) -> None:
    weights = [
        random_weights(generator, hidden=HIDDEN, intermediate=INTERMEDIATE, dtype=torch.bfloat16)
        for _ in range(NUM_EXPERTS)
    ]
    formats: tuple[QuantizedFormat | None, ...] = (None, "int8", "int8", None, "int4")
    mixed = {
        expert: PackedExpert(weight, dtype=torch.bfloat16, device=CPU, quantized=held_as)
        for expert, (weight, held_as) in enumerate(zip(weights, formats, strict=True))
    }
    frame = frame_of(generator, 30, torch.bfloat16, combine=False)
    (rows,) = moe_forward_each(mixed, [frame])
    assigned, start = frame.assignments, 0
    for expert, count in zip(assigned.expert_ids, assigned.rows_per_expert, strict=True):
        part = slice(start, start + count)
        alone = mixed[expert].forward(frame.hidden_states[assigned.token_rows[part]])
        weighted = (alone * assigned.topk_weights[part, None]).to(torch.bfloat16)
        assert torch.equal(rows[part], weighted)
        start += count


def test_nan_stays_in_its_token(library: NativeLibrary, generator: torch.Generator) -> None:
    native, _ = random_experts(generator, torch.bfloat16)
    frame = frame_of(generator, 20, torch.bfloat16)
    (expected,) = moe_forward_each(native, [frame])
    frame.hidden_states[4, 9] = float("nan")
    (result,) = moe_forward_each(native, [frame])
    others = [token for token in range(20) if token != 4]
    assert torch.equal(result[others], expected[others])
    assert result[4].isnan().all()


def test_a_token_row_that_the_frame_lacks_is_an_error(
    library: NativeLibrary, generator: torch.Generator
) -> None:
    native, _ = random_experts(generator, torch.float32)
    frame = frame_of(generator, 6, torch.float32)
    frame.assignments.token_rows[-1] = 6
    with pytest.raises(IndexError):
        moe_forward_each(native, [frame])


def test_rows_of_another_length_are_refused(
    library: NativeLibrary, generator: torch.Generator
) -> None:
    native, _ = random_experts(generator, torch.float32)
    with pytest.raises(ValueError, match=f"not of {HIDDEN}"):
        native[0].forward(torch.ones(2, HIDDEN + 1))


def _integers(generator: torch.Generator, shape: tuple[int, int], bound: int) -> Tensor:
    return torch.randint(-bound, bound + 1, shape, generator=generator).float()


def _two_ones_a_row(generator: torch.Generator, shape: tuple[int, int]) -> Tensor:
    ones = torch.rand(shape, generator=generator).topk(2).indices
    return torch.zeros(shape).scatter_(1, ones, 1.0)


def _only(frame: MoeInput, token: int) -> MoeInput:
    """The frame with one of its tokens alone."""
    assigned = frame.assignments
    is_its = assigned.token_rows == token
    rows_per_expert = [
        int(part.sum()) for part in torch.split(is_its, list(assigned.rows_per_expert))
    ]
    return MoeInput(
        hidden_states=frame.hidden_states[token : token + 1],
        assignments=Assignments(
            expert_ids=assigned.expert_ids,
            rows_per_expert=tuple(rows_per_expert),
            token_rows=torch.zeros(sum(rows_per_expert), dtype=torch.int64),
            topk_weights=assigned.topk_weights[is_its],
        ),
        combine=frame.combine,
    )
