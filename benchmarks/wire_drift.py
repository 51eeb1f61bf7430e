"""What narrower rows on the wire change in a model's answers, and what they save.

    python -m benchmarks.wire_drift [--model models/demo] [--tokens 192] [--workers 4]

The model, and a random one of other widths, score the same tokens with experts in process whose
rows are rounded as each wire rounds them (the tests show that workers give the same bits). Prints,
against the activation dtype on the wire, the relative error of the logits, how often the likeliest
token is the same, how long a greedy continuation stays the same, and the bytes of frames and
answers per token and full pass.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.random_checkpoint import RandomShape, write_random_checkpoint
from router_service.dispatch.dispatch_plan import group_by_expert, plan_dispatch
from router_service.dispatch.local_experts import LocalExperts
from router_service.dispatch.wire_rows import WireRows
from router_service.experts import StepContext
from router_service.model.decoder import MixtralDecoder
from services.core.bit_patterns import bit_patterns
from services.core.checkpoints.checkpoint import Checkpoint
from services.core.placement import plan_placement
from services.core.routing_table import NO_WORKER
from services.core.settings import WireDTypeName
from services.core.tensor_codec import dtype_name
from services.core.wire import RequestHeader, encode_response
from services.core.wire_dtype import WireFormat
from tests.support.forward import HandEngine, HandSequence, Part

CPU = torch.device("cpu")
GREEDY_TOKENS = 64
RANDOM_SHAPE = RandomShape(
    hidden_size=256,
    intermediate_size=896,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
    vocab_size=4000,
)
WIRES: tuple[tuple[torch.dtype, tuple[WireDTypeName, ...]], ...] = (
    (torch.bfloat16, ("auto", "int8")),
    (torch.float32, ("auto", "bfloat16", "int8")),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="models/demo")
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--workers", type=int, default=4)
    arguments = parser.parse_args()
    sys.stdout.write(
        "| model | activations | wire | logits off by | same likeliest token | greedy agreement "
        "| bytes per token |\n|---|---|---|---|---|---|---|\n"
    )
    with tempfile.TemporaryDirectory(prefix="expertfleet-drift-") as scratch:
        folder = Path(scratch) / "random"
        write_random_checkpoint(folder, RANDOM_SHAPE)
        for name, model in ((arguments.model, arguments.model), ("random", str(folder))):
            for dtype, wires in WIRES:
                asyncio.run(_print_rows(name, model, dtype, wires, arguments))


async def _print_rows(
    name: str,
    model: str,
    dtype: torch.dtype,
    wires: tuple[WireDTypeName, ...],
    arguments: argparse.Namespace,
) -> None:
    reference: _Run | None = None
    for wire in wires:
        run = await _run(model, dtype, wire, arguments.tokens, arguments.workers)
        reference = reference or run
        off = (run.logits - reference.logits).norm() / reference.logits.norm()
        same = (run.logits.argmax(-1) == reference.logits.argmax(-1)).float().mean()
        pairs = zip(run.greedy, reference.greedy, strict=True)
        agreed = next((i for i, (a, b) in enumerate(pairs) if a != b), GREEDY_TOKENS)
        sys.stdout.write(
            f"| {name} | {dtype_name(dtype)} | {wire} | {off:.2%} | {same:.1%} "
            f"| {agreed} of {GREEDY_TOKENS} | {run.bytes_per_token:.0f} |\n"
        )
        sys.stdout.flush()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """`logits` float32 [tokens, vocabulary]."""

    logits: Tensor
    greedy: list[int]
    bytes_per_token: float


@torch.inference_mode()
async def _run(
    model: str, dtype: torch.dtype, wire: WireDTypeName, num_tokens: int, num_workers: int
) -> _Run:
    checkpoint = Checkpoint.open(model)
    config = checkpoint.config
    experts = _CountingExperts(
        LocalExperts.load(checkpoint, dtype=dtype, device=CPU, wire_dtype=wire),
        WireFormat.of(wire, dtype),
        num_workers=num_workers,
        num_layers=config.num_hidden_layers,
        num_experts=config.num_local_experts,
    )
    engine = HandEngine(
        MixtralDecoder.load(checkpoint, dtype=dtype, device=CPU),
        experts,
        num_blocks=64,
        block_size=16,
    )
    generator = torch.Generator().manual_seed(1)
    token_ids = torch.randint(3, config.vocab_size, (num_tokens,), generator=generator).tolist()
    sequence = HandSequence(token_ids=token_ids)
    logits = await engine.step([Part(sequence, num_tokens, range(num_tokens))])
    bytes_per_token = experts.num_bytes / num_tokens
    greedy: list[int] = []
    last = logits[-1]
    for _ in range(GREEDY_TOKENS):
        greedy.append(int(last.argmax()))
        sequence.token_ids.append(greedy[-1])
        last = (await engine.step([Part(sequence, 1)]))[-1]
    return _Run(logits=logits.float(), greedy=greedy, bytes_per_token=bytes_per_token)


class _CountingExperts(LocalExperts):
    """Experts in process that count the bytes which workers would have been sent and answered."""

    def __init__(
        self,
        experts: LocalExperts,
        wire_format: WireFormat,
        *,
        num_workers: int,
        num_layers: int,
        num_experts: int,
    ) -> None:
        self._experts = experts
        self._format = wire_format
        self._num_experts = num_experts
        self._workers = torch.full((num_layers, num_experts), NO_WORKER).numpy()
        for worker, part in enumerate(plan_placement(num_layers, num_experts, num_workers)):
            for layer, expert in part.slots():
                self._workers[layer, expert] = worker
        self.num_bytes = 0

    async def forward(
        self,
        layer: int,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        context: StepContext,
    ) -> Tensor:
        self._count(layer, hidden_states, topk_ids, topk_weights)
        return await self._experts.forward(layer, hidden_states, topk_ids, topk_weights, context)

    def _count(
        self, layer: int, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> None:
        gated = group_by_expert(
            topk_ids, topk_weights, self._num_experts, may_combine=not self._format.narrows_answers
        )
        rows = WireRows(hidden_states, bit_patterns(hidden_states), self._format)
        header = RequestHeader(
            layer=layer,
            dtype=self._format.request,
            hidden_size=rows.hidden_size,
            combine=gated.combine,
            answer_dtype=self._format.answer if self._format.narrows_answers else None,
        )
        plan = plan_dispatch(gated, self._workers[layer])
        for frame, selected in zip(plan.frames, rows.select(plan), strict=True):
            request = header.frame(
                call_id=1,
                payload=selected.data,
                num_tokens=len(selected),
                expert_ids=frame.expert_ids,
                rows_per_expert=frame.rows_per_expert,
                token_rows=frame.token_rows,
                topk_weights=frame.topk_weights,
                scales=rows.scales(frame.token_ids),
            )
            num_rows = len(selected) if gated.combine else frame.num_assignments
            answer = torch.empty(num_rows, rows.hidden_size, dtype=self._format.answer)
            self.num_bytes += len(request) + len(encode_response(call_id=1, hidden_states=answer))


if __name__ == "__main__":
    main()
