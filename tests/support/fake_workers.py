"""Workers inside the test: the real frames and the real maths, no network, and faults at will."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch

from protos import experts_pb2
from router_service.dispatch.transport import OnAnswer
from services.core.errors import UnavailableError
from services.core.expert_ffn import PackedExpert, moe_forward
from services.core.model_config import ModelConfig
from services.core.registry import Slot, WorkerRecord
from services.core.tensor_codec import DTYPE_TO_PROTO
from services.core.wire import (
    RequestFrame,
    decode_request,
    decode_response,
    encode_error,
    encode_response,
)
from tests.support.moe_layers import random_expert
from tests.support.records import worker_record

Fault = Literal["silent", "break", "draining", "internal", "unknown", "invalid", "short", "twice"]

_STATUS = {
    "draining": experts_pb2.DISPATCH_STATUS_DRAINING,
    "internal": experts_pb2.DISPATCH_STATUS_INTERNAL,
    "unknown": experts_pb2.DISPATCH_STATUS_UNKNOWN_EXPERT,
    "invalid": experts_pb2.DISPATCH_STATUS_INVALID_FRAME,
}


def tiny_config(
    *, num_layers: int = 2, num_experts: int = 4, top_k: int = 2, dtype: str = "float32"
) -> ModelConfig:
    return ModelConfig(
        architecture="MixtralForCausalLM",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=64,
        num_local_experts=num_experts,
        num_experts_per_tok=top_k,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        sliding_window=None,
        tie_word_embeddings=False,
        hidden_act="silu",
        dtype=dtype,
        bos_token_id=None,
        eos_token_ids=(),
    )


def random_model(config: ModelConfig, dtype: torch.dtype) -> list[dict[int, PackedExpert]]:
    """Every layer's experts, random."""
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    return [
        {
            expert: random_expert(
                generator,
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                dtype=dtype,
            )
            for expert in range(config.num_local_experts)
        }
        for _ in range(config.num_hidden_layers)
    ]


@dataclass(kw_only=True)
class FakeWorker:
    """Serves `slots` of `model`. The next frames meet `faults`, one each; then all is well."""

    worker_id: str
    config: ModelConfig
    model: list[dict[int, PackedExpert]]
    slots: frozenset[Slot]
    dtype: torch.dtype = torch.float32
    state: experts_pb2.WorkerState = experts_pb2.WORKER_STATE_READY
    max_frame_bytes: int = 1 << 20
    is_up: bool = True
    delay_s: float = 0.0
    """How long every frame takes beside its computing."""
    faults: deque[Fault] = field(default_factory=deque)
    requests: list[RequestFrame] = field(default_factory=list)
    links: list[FakeLink] = field(default_factory=list)
    describing: asyncio.Event | None = None
    """Set, it holds up who asks what the worker holds."""
    late: list[tuple[asyncio.TimerHandle, Callable[[], None]]] = field(default_factory=list)
    """Answers that `delay_s` holds up."""

    @property
    def record(self) -> WorkerRecord:
        return worker_record(self.worker_id, self.slots, endpoint=f"{self.worker_id}:1")

    def describe(self) -> experts_pb2.DescribeResponse:
        return experts_pb2.DescribeResponse(
            worker_id=self.worker_id,
            state=self.state,
            num_layers=self.config.num_hidden_layers,
            num_experts=self.config.num_local_experts,
            hidden_size=self.config.hidden_size,
            intermediate_size=self.config.intermediate_size,
            dtype=DTYPE_TO_PROTO[self.dtype],
            max_frame_bytes=self.max_frame_bytes,
            slots=[
                experts_pb2.Slot(layer=layer, expert=expert, digest=bytes([layer, expert]))
                for layer, expert in sorted(self.slots)
            ],
        )

    def answer_late(self) -> None:
        """Give all answers that `delay_s` holds up now."""
        late, self.late = self.late, []
        for timer, deliver in late:
            timer.cancel()
            deliver()

    def kill(self) -> None:
        self.is_up = False
        for link in list(self.links):
            link.break_off("killed")

    def answer(self, frame: bytes) -> bytes | None:
        """What goes back over the wire; None for nothing."""
        request = decode_request(frame, max_frame_bytes=self.max_frame_bytes)
        self.requests.append(request)
        fault = self.faults.popleft() if self.faults else None
        unheld = [e for e in request.assignments.expert_ids if (request.layer, e) not in self.slots]
        if unheld:
            fault = "unknown"
        if fault == "silent":
            return None
        if fault in _STATUS:
            return encode_error(call_id=request.call_id, status=_STATUS[fault], error=fault)
        rows = moe_forward(
            self.model[request.layer],
            request.rows(self.dtype),
            request.assignments,
            combine=request.combine,
        ).to(request.answer_dtype or self.dtype)
        if fault == "short":
            rows = rows[:-1]
        return encode_response(call_id=request.call_id, hidden_states=rows)


class FakeLink:
    """A `WorkerLink` to a `FakeWorker`."""

    def __init__(self, worker: FakeWorker, on_broken: Callable[[str], None]) -> None:
        self._worker = worker
        self._on_broken = on_broken
        self._in_flight: dict[int, OnAnswer] = {}
        self.broken: str | None = None

    async def describe(self, timeout_s: float) -> experts_pb2.DescribeResponse:
        if not self._worker.is_up:
            raise UnavailableError(f"{self._worker.worker_id} is down")
        if self not in self._worker.links:
            self._worker.links.append(self)
        description = self._worker.describe()
        if self._worker.describing is not None:
            await self._worker.describing.wait()
        return description

    def send(self, stream: int, call_id: int, frame: bytes, on_answer: OnAnswer) -> None:
        if self.broken is not None:
            on_answer(None)
            return
        self._in_flight[call_id] = on_answer
        loop = asyncio.get_running_loop()
        if self._worker.faults and self._worker.faults[0] == "break":
            self._worker.faults.popleft()
            loop.call_soon(self.break_off, "broke on a frame")
        elif self._worker.faults and self._worker.faults[0] == "twice":
            self._worker.faults.popleft()
            loop.call_soon(self._deliver, frame, call_id)
            loop.call_soon(self._deliver, frame, call_id)
        elif self._worker.delay_s:
            deliver = partial(self._deliver, frame, call_id)
            self._worker.late.append((loop.call_later(self._worker.delay_s, deliver), deliver))
        else:
            loop.call_soon(self._deliver, frame, call_id)

    def forget(self, call_id: int) -> None:
        self._in_flight.pop(call_id, None)

    async def close(self) -> None:
        self.break_off("closed")

    def break_off(self, reason: str) -> None:
        if self.broken is not None:
            return
        self.broken = reason
        if self in self._worker.links:
            self._worker.links.remove(self)
        waiting, self._in_flight = self._in_flight, {}
        self._on_broken(reason)
        for on_answer in waiting.values():
            on_answer(None)

    def _deliver(self, frame: bytes, call_id: int) -> None:
        if self.broken is not None:
            return
        response = self._worker.answer(frame)
        on_answer = self._in_flight.get(call_id)
        if response is not None and on_answer is not None:
            del self._in_flight[call_id]
            on_answer(decode_response(response))


class FakeTransport:
    """An `ExpertTransport` to workers by the endpoint in their records."""

    def __init__(self, workers: Iterable[FakeWorker]) -> None:
        self._workers: Mapping[str, FakeWorker] = {w.record.endpoint: w for w in workers}

    def open(self, endpoint: str, on_broken: Callable[[str], None]) -> FakeLink:
        return FakeLink(self._workers[endpoint], on_broken)
