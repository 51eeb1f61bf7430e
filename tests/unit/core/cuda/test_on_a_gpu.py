"""The same claims on a CUDA device, and those that only one can show. Skipped without one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from services.core.cuda.device_support import DeviceSupport
from services.core.cuda.expert import CudaExpert
from services.core.cuda.frames import staged_moe_forward
from services.core.cuda.graph_cache import GraphCache
from services.core.cuda.layer import CudaLayer
from services.core.cuda.linears import WEIGHT_FORMATS, WeightFormat, make_linear
from services.core.cuda.staging import StagingBuffers
from tests.unit.core.cuda.oracle import CPU, ffn, random_frame, random_weights, relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

HIDDEN, INTERMEDIATE = 512, 1024
EXPERTS = [0, 2, 5]
PRODUCT_ERROR = {"bf16": 0.005, "fp8": 0.04, "int8": 0.015, "int4": 0.01}
EXPERT_ERROR = {"bf16": 0.01, "fp8": 0.08, "int8": 0.03, "int4": 0.02}


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def cuda() -> torch.device:
    return torch.device("cuda", 0)


@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
@pytest.mark.parametrize("num_rows", [0, 1, 17, 300])
def test_a_product_is_that_of_the_dequantised_weight(
    cuda: torch.device, weight_format: WeightFormat, num_rows: int
) -> None:
    weight = torch.randn(INTERMEDIATE, HIDDEN, device=cuda).bfloat16()
    rows = torch.randn(num_rows, HIDDEN, device=cuda).bfloat16()
    linear = make_linear(weight, weight_format, DeviceSupport.of(cuda))
    product = linear(rows)
    assert product.shape == (num_rows, INTERMEDIATE)
    if num_rows:
        # float64: TF32 may be what float32 products run in.
        wanted = rows.double() @ linear.dequantised().double().t()
        assert relative_error(product, wanted) <= PRODUCT_ERROR[weight_format]


def test_the_int4_kernels_own_layout_stands_for_the_same_weight(cuda: torch.device) -> None:
    weight = torch.randn(64, HIDDEN).bfloat16()
    there = make_linear(weight.to(cuda), "int4", DeviceSupport.of(cuda)).dequantised()
    here = make_linear(weight, "int4", DeviceSupport.of(CPU)).dequantised()
    assert relative_error(there.cpu(), here) <= 0.005


@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
def test_a_replayed_expert_gives_what_it_gives_without_graphs(
    cuda: torch.device, weight_format: WeightFormat
) -> None:
    weights = random_weights(HIDDEN, INTERMEDIATE)
    graphs = GraphCache.of(cuda)
    replayed, plain = (
        CudaExpert(
            weights,
            dtype=torch.bfloat16,
            device=cuda,
            weight_format=weight_format,
            graphs=use,
        )
        for use in (graphs, None)
    )
    for num_rows in (1, 3, 8, 3, 31, 33):
        rows = torch.randn(num_rows, HIDDEN, device=cuda).bfloat16()
        first = replayed.forward(rows)
        replayed.forward(torch.randn_like(rows))
        assert relative_error(first, plain.forward(rows)) <= 0.01
        w1, w2, w3 = (part.cpu() for part in plain.dequantised())
        wanted = ffn(w1, w2, w3, rows.cpu())
        assert relative_error(first.cpu(), wanted) <= EXPERT_ERROR[weight_format]
    assert graphs.num_graphs == 4


def test_graphs_of_several_experts_do_not_disturb_each_other(cuda: torch.device) -> None:
    graphs = GraphCache.of(cuda)
    weights = [random_weights(HIDDEN, INTERMEDIATE) for _ in range(4)]
    experts = [CudaExpert(one, dtype=torch.bfloat16, device=cuda, graphs=graphs) for one in weights]
    for _ in range(3):
        rows = [torch.randn(2, HIDDEN, device=cuda).bfloat16() for _ in experts]
        results = [expert.forward(own) for expert, own in zip(experts, rows, strict=True)]
        for one, own, result in zip(weights, rows, results, strict=True):
            assert relative_error(result.cpu(), ffn(one.w1, one.w2, one.w3, own.cpu())) <= 0.01


@pytest.mark.parametrize("grouped_rows", [None, 1], ids=["one by one", "grouped"])
def test_staged_frames_are_the_weighted_sums_of_their_experts(
    cuda: torch.device, grouped_rows: int | None
) -> None:
    if grouped_rows and not DeviceSupport.of(cuda).grouped:
        pytest.skip("the card has no grouped product")
    weights = {expert: random_weights(HIDDEN, INTERMEDIATE) for expert in EXPERTS}
    there, here = (
        CudaLayer(
            {
                expert: CudaExpert(one, dtype=torch.bfloat16, device=device)
                for expert, one in weights.items()
            },
            grouped_rows=rows,
        )
        for device, rows in ((cuda, grouped_rows), (CPU, None))
    )
    staging = StagingBuffers(cuda)
    for _ in range(4):  # copies of one round may still be under way in the next
        frames = [random_frame(tokens, HIDDEN, EXPERTS) for tokens in (1, 40, 7)]
        for got, want in zip(
            staged_moe_forward(staging, there, frames), here.forward_frames(frames), strict=True
        ):
            assert got.is_cpu
            assert relative_error(got, want) <= 0.01


def test_staged_copies_keep_what_they_were_given(cuda: torch.device) -> None:
    staging = StagingBuffers(cuda)
    sent = [torch.randn(3, 1000), torch.arange(77)]
    copies = [staging.to_host(staging.to_device(sent)) for _ in range(20)]
    for copy in copies:
        for got, want in zip(copy.wait(), sent, strict=True):
            assert got.is_pinned()
            assert torch.equal(got, want)


def test_kernels_launched_after_a_staged_copy_see_it(cuda: torch.device) -> None:
    staging = StagingBuffers(cuda)
    total = torch.zeros(1 << 20, device=cuda)
    for value in range(10):
        (there,) = staging.to_device([torch.full((1 << 20,), float(value))])
        total += there
    assert torch.equal(staging.to_host([total]).wait()[0], torch.full((1 << 20,), 45.0))
