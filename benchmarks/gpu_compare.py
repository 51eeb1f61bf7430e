"""One model's comparison: every side in turn on the same weights, tokens and past keys."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.gpu_kernels import held_layer, measure_copies, measure_experts, measure_layers
from benchmarks.gpu_sides import (
    DecoderSide,
    PastKeys,
    Side,
    StagedExperts,
    TransformersSide,
)
from benchmarks.gpu_timing import Ceilings, Deadline
from benchmarks.gpu_weights import HeldWeights, attention_params, random_config
from benchmarks.gpu_worker import loop_factory
from benchmarks.gpu_workers import seeded_workers
from router_service.dispatch.dispatcher import RemoteExperts
from router_service.dispatch.local_experts import LocalExperts
from router_service.model.decoder import MixtralDecoder
from services.core.checkpoints.checkpoint import Checkpoint
from services.core.cuda.graph_cache import GraphCache
from services.core.cuda.layer import GROUPED_ROWS
from services.core.errors import ExpertfleetError
from services.core.model_config import ModelConfig
from services.core.static_registry import StaticRegistry

IN_PROCESS = "in process"
CUDA_KERNELS = "in process, CUDA kernels"
OVER_GRPC = "over gRPC"
_CHECKED_BATCH = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """How much is measured. Batches are decoded, prompts prefilled one at a time."""

    batches: tuple[int, ...]
    prompts: tuple[int, ...]
    kernel_rows: tuple[int, ...]
    context: int
    num_steps: int
    num_rounds: int
    num_workers: int


@dataclass(slots=True, kw_only=True)
class Workload:
    """`seconds` of each side's steps, or of its prompts; `split` are means a step, over gRPC."""

    kind: str
    size: int
    floor_s: float = 0.0
    active_experts: int = 0
    seconds: dict[str, list[float]] = field(default_factory=dict)
    split_ms: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        sides = {}
        for name, seconds in self.seconds.items():
            median = statistics.median(seconds)
            sides[name] = {
                "ms": round(median * 1e3, 3),
                "least_ms": round(min(seconds) * 1e3, 3),
                "most_ms": round(max(seconds) * 1e3, 3),
                "tokens_per_s": round(self.size / median, 1),
                "floor_share": round(self.floor_s / median, 3),
            }
        return {
            "kind": self.kind,
            "size": self.size,
            "floor_ms": round(self.floor_s * 1e3, 3),
            "active_experts": self.active_experts,
            "sides": sides,
            "over_grpc_ms": {name: round(value, 3) for name, value in self.split_ms.items()},
        }


def compare(
    shape: str,
    num_layers: int,
    device: torch.device,
    ceilings: Ceilings,
    extent: Extent,
    deadline: Deadline,
) -> dict[str, Any]:
    """All figures of one model; what could not be had is among the deadline's `skipped`."""
    config = random_config(shape, num_layers)
    with seeded_workers(
        shape,
        num_layers=num_layers,
        num_experts=config.num_local_experts,
        num_workers=extent.num_workers,
        device=str(device),
        deadline=deadline,
    ) as wait_for_workers:
        weights = HeldWeights(config, device)
        comparison = _Comparison(weights, device, ceilings, extent, deadline)
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            endpoints: list[str] = []
            try:
                endpoints = wait_for_workers()
            except (TimeoutError, RuntimeError) as error:
                deadline.skipped.append(f"{shape} over gRPC: {error}")
            figures = runner.run(comparison.run(endpoints))
    return {"shape": shape, "num_layers": num_layers} | figures


def kernel_tables(
    shape: str, device: torch.device, ceilings: Ceilings, extent: Extent, deadline: Deadline
) -> dict[str, Any]:
    """Times of the product's kernels by themselves, on one layer. Run last: a kernel that fails on
    a card may leave the process unable to use it."""
    config = random_config(shape, 1)
    counts = extent.kernel_rows
    weights = HeldWeights(config, device)
    return {
        "shape": shape,
        "experts": list(measure_experts(weights, device, ceilings, deadline, row_counts=counts)),
        "layers": list(measure_layers(weights, device, deadline, token_counts=counts)),
        "copies": list(measure_copies(config.hidden_size, device, token_counts=counts)),
    }


class _Comparison:
    def __init__(
        self,
        weights: HeldWeights,
        device: torch.device,
        ceilings: Ceilings,
        extent: Extent,
        deadline: Deadline,
    ) -> None:
        self._config = weights.config
        self._weights = weights
        self._device = device
        self._ceilings = ceilings
        self._extent = extent
        self._deadline = deadline
        decoded = max(extent.batches) * (extent.context + extent.num_steps + 16)
        self._past = PastKeys(
            self._config,
            device,
            context=extent.context,
            max_tokens=max(decoded, *extent.prompts) + 16,
        )
        self._remote: RemoteExperts | None = None

    async def run(self, endpoints: Sequence[str]) -> dict[str, Any]:
        if endpoints:
            try:
                self._remote = await self._connect(endpoints)
            except ExpertfleetError as error:
                self._deadline.skipped.append(f"over gRPC: {error.message}")
        try:
            sides, local = self._sides()
            agreement = await self._check(sides)
            done = []
            for batch in self._extent.batches:
                done.append(await self._measure(Workload(kind="decode", size=batch), sides, local))
            for prompt in self._extent.prompts:
                work = Workload(kind="prefill", size=prompt)
                done.append(await self._measure(work, sides, local))
        finally:
            if self._remote is not None:
                await self._remote.close()
        measured = [work.as_json() for work in done if work.seconds]
        order = {"decode": 0, "prefill": 1}
        measured.sort(key=lambda work: (order[work["kind"]], work["size"]))
        return {
            "sides": [side.name for side in sides],
            "agreement": agreement,
            "workloads": measured,
        }

    async def _connect(self, endpoints: Sequence[str]) -> RemoteExperts:
        remote = RemoteExperts(
            self._config,
            registry=StaticRegistry(endpoints),
            dtype=torch.bfloat16,
            expert_wait_s=max(1.0, min(60.0, self._deadline.remaining_s())),
        )
        await remote.wait_ready()
        return remote

    def _sides(self) -> tuple[list[Side], LocalExperts]:
        weights, device = self._weights, self._device
        decoder = MixtralDecoder.load(weights, dtype=torch.bfloat16, device=device)
        local = LocalExperts.load(cast(Checkpoint, weights), dtype=torch.bfloat16, device=device)
        graphs = GraphCache.of(device)
        layers = [
            held_layer(weights, layer, graphs=graphs, grouped_rows=GROUPED_ROWS)
            for layer in range(self._config.num_hidden_layers)
        ]
        staged = StagedExperts(layers, device, self._config.num_local_experts)
        sides: list[Side] = [
            DecoderSide(IN_PROCESS, decoder, local, self._past),
            DecoderSide(CUDA_KERNELS, decoder, staged, self._past),
        ]
        if self._remote is not None:
            sides.append(DecoderSide(OVER_GRPC, decoder, self._remote, self._past))
        try:
            sides.append(TransformersSide(weights, self._past, device))
        except (ImportError, AttributeError, TypeError, ValueError, RuntimeError) as error:
            # Whichever version is installed there, the other sides are worth the run.
            self._deadline.skipped.append(f"transformers: {type(error).__name__}: {error}")
        return sides, local

    async def _check(self, sides: Sequence[Side]) -> dict[str, dict[str, float]]:
        """How far each side's logits of one step are from the first side's, and the share of its
        most likely tokens that are the same."""
        tokens = self._tokens(_CHECKED_BATCH)
        wanted = (await sides[0].decode(tokens, 1))[1]
        agreement = {}
        for side in sides[1:]:
            got = (await side.decode(tokens, 1))[1]
            agreement[side.name] = {
                "relative_error": round(float((got - wanted).norm() / wanted.norm()), 5),
                "same_tokens": float((got.argmax(-1) == wanted.argmax(-1)).float().mean()),
            }
        return agreement

    async def _measure(
        self, work: Workload, sides: Sequence[Side], local: LocalExperts
    ) -> Workload:
        """Rounds alternate between the sides; a side's first run of each size is not counted."""
        if not self._deadline.allows(
            f"{work.kind} {work.size}", needs_s=10 if self._is_cuda else 0
        ):
            return work
        tokens = self._tokens(work.size)
        work.active_experts = await self._active_experts(work, tokens, sides[0], local)
        work.floor_s = self._ceilings.floor_s(*self._least(work))
        failed: set[str] = set()
        splits: list[dict[str, float]] = []
        for round_number in range(self._extent.num_rounds + 1):
            for side in sides:
                if side.name in failed:
                    continue
                try:
                    seconds = await self._seconds(work, tokens, side)
                except (RuntimeError, ExpertfleetError) as error:
                    failed.add(side.name)
                    text = str(error).splitlines()[0][:160]
                    self._deadline.skipped.append(
                        f"{work.kind} {work.size}, {side.name}: {type(error).__name__}: {text}"
                    )
                    continue
                split = self._split(seconds) if side.name == OVER_GRPC else {}
                if round_number == 0:
                    continue
                work.seconds.setdefault(side.name, []).extend(seconds)
                if split:
                    splits.append(split)
        if splits:
            work.split_ms = {
                name: statistics.median(split[name] for split in splits) for name in splits[0]
            }
        return work

    async def _seconds(self, work: Workload, tokens: Tensor, side: Side) -> list[float]:
        if work.kind == "prefill":
            return [(await side.prefill(tokens))[0]]
        return (await side.decode(tokens, self._extent.num_steps))[0]

    def _split(self, seconds: Sequence[float]) -> dict[str, float]:
        """Milliseconds of a step over gRPC, by where they were spent since the last call."""
        assert self._remote is not None
        timings = self._remote.take_timings()
        parts = {
            "experts and their copies": timings.expert_ns,
            "queue": timings.queue_ns,
            "wire": timings.wire_ns,
            "pack": timings.pack_ns,
            "combine": timings.combine_ns,
        }
        split = {name: nanoseconds / 1e6 / len(seconds) for name, nanoseconds in parts.items()}
        split["attention, gate, head"] = sum(seconds) / len(seconds) * 1e3 - sum(split.values())
        return split

    async def _active_experts(
        self, work: Workload, tokens: Tensor, side: Side, local: LocalExperts
    ) -> int:
        """(layer, expert) slots that a step of the workload needs."""
        before = local.expert_load().copy()
        if work.kind == "prefill":
            await side.prefill(tokens)
        else:
            await side.decode(tokens, 1)
        return int((local.expert_load() - before > 0).sum())

    def _least(self, work: Workload) -> tuple[float, float]:
        """Bytes that a step must read and operations it must do, whoever computes it."""
        config, layers = self._config, self._config.num_hidden_layers
        head = config.hidden_size * config.vocab_size
        attention = attention_params(config) * layers
        expert = config.expert_bytes(1)
        is_decode = work.kind == "decode"
        past_tokens = work.size * self._extent.context if is_decode else 0
        num_bytes = (
            2 * (head + attention)
            + work.active_experts * 2 * expert
            + past_tokens * config.kv_bytes_per_token(2)
        )
        seen = self._extent.context if is_decode else work.size / 2
        scores = 2 * seen * config.num_attention_heads * config.head_dim * layers
        per_token = attention + layers * config.num_experts_per_tok * expert + scores
        num_logits = work.size if is_decode else 1
        return num_bytes, 2 * (work.size * per_token + num_logits * head)

    def _tokens(self, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(count)
        tokens = torch.randint(self._config.vocab_size, (count,), generator=generator)
        return tokens.to(self._device)

    @property
    def _is_cuda(self) -> bool:
        return self._device.type == "cuda"


def layers_that_fit(shape: str, device: torch.device, *, at_most: int, num_workers: int) -> int:
    """Layers of which one copy in this process and one over the workers fit on the device, with
    room for caches, activations and the workers' contexts; 0 where not even one does."""
    if device.type != "cuda":
        return at_most
    config: ModelConfig = random_config(shape, 1)
    free = torch.cuda.mem_get_info(device)[0]
    ends = 4 * config.vocab_size * config.hidden_size
    room = 0.88 * free - ends - (3 << 30) - num_workers * (640 << 20)
    layer = 2 * config.num_local_experts * config.expert_bytes(2) + 8 * attention_params(config)
    return max(0, min(at_most, int(room // layer)))
