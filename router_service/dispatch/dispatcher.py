"""Experts in other processes: the `ExpertBackend` that dispatches over the network."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from opentelemetry.trace import Tracer
from prometheus_client import CollectorRegistry
from torch import Tensor

from router_service.dispatch.admission import AdmissionRules
from router_service.dispatch.dispatch_plan import combine_frames, group_by_expert
from router_service.dispatch.dispatch_telemetry import DispatchTelemetry
from router_service.dispatch.dispatch_timings import DispatchTimings
from router_service.dispatch.expert_load import ExpertLoad
from router_service.dispatch.lane_calls import LaneCall, LaneCalls
from router_service.dispatch.lane_rounds import LaneRounds
from router_service.dispatch.lane_transport import LaneTransport
from router_service.dispatch.layer_dispatch import (
    DispatchLimits,
    DispatchParts,
    LayerCall,
    LayerDispatch,
)
from router_service.dispatch.non_finite import blank, find_non_finite, spoil
from router_service.dispatch.replica_chooser import ReplicaChooser
from router_service.dispatch.retry_budget import RetryBudget
from router_service.dispatch.sent_frame import Answered
from router_service.dispatch.transport import ExpertTransport
from router_service.dispatch.wire_rows import WireRows
from router_service.dispatch.worker_link import GrpcTransport
from router_service.dispatch.worker_pool import WorkerPool, log_crash
from router_service.experts import LayersDone, StepContext, StepLayers
from services.core.bit_patterns import bit_patterns
from services.core.errors import UnavailableError
from services.core.model_config import ModelConfig
from services.core.registry import Registry, Slot
from services.core.registry_json import format_ranges
from services.core.settings import WireDTypeName
from services.core.tensor_codec import tensor_from_buffer
from services.core.wire_dtype import WireFormat

logger = logging.getLogger(__name__)

_TICK_S = 0.5
_LOOK_AGAIN_S = 0.1
"""After a link broke: a worker that is there makes it again sooner, one that takes the name of a
dead one needs longer."""


class RemoteExperts:
    """Made on any thread, used on one event loop. It owns the registry client given to it.

    `dtype` is that of activations, `wire_dtype` what rows are sent in (`WireFormat`).
    `expert_wait_s` bounds the wait for a replica after a call's first failure, `call_timeout_s`
    one frame; where the pace of workers is known a frame is sent to a second one much earlier.
    `seed` decides between replicas that are equally good. The registry is read every `refresh_s`;
    a worker that is missing there is kept as long as its link holds.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        registry: Registry,
        dtype: torch.dtype,
        wire_dtype: WireDTypeName = "auto",
        expert_wait_s: float = 60.0,
        call_timeout_s: float = 30.0,
        max_frame_bytes: int = 256 << 20,
        refresh_s: float = 0.5,
        local_host: str | None = None,
        seed: int = 0,
        transport: ExpertTransport | None = None,
        tracer: Tracer | None = None,
        metrics: CollectorRegistry | None = None,
    ) -> None:
        self._registry = registry
        self._num_experts = config.num_local_experts
        self._refresh_s = refresh_s
        self._look_again = asyncio.Event()
        self._chooser = ReplicaChooser(call_timeout_s=call_timeout_s, seed=seed)
        limits = DispatchLimits(
            expert_wait_s=expert_wait_s,
            call_timeout_s=call_timeout_s,
            max_frame_bytes=max_frame_bytes,
        )
        self._load = ExpertLoad(config.num_hidden_layers, config.num_local_experts)
        self._load.export(metrics)
        self._telemetry = DispatchTelemetry(tracer, metrics)
        self._pool = WorkerPool(
            transport or GrpcTransport(max_frame_bytes=max_frame_bytes),
            AdmissionRules.of(config, dtype),
            local_host=local_host,
            chooser=self._chooser,
            on_gone=self._telemetry.forget_worker,
            on_ejected=self._telemetry.count_ejection,
            on_lost=self._telemetry.count_lost,
            on_broken=self._look_again.set,
        )
        self._telemetry.export_workers(self._chooser.figures, lambda: len(self._pool.refusals()))
        self._parts = DispatchParts(
            pool=self._pool,
            chooser=self._chooser,
            budget=RetryBudget(),
            limits=limits,
            telemetry=self._telemetry,
            call_ids=itertools.count(1),
        )
        self._wire_format = WireFormat.of(wire_dtype, dtype)
        self._lane_calls: LaneCalls | None = None
        if isinstance(transport, LaneTransport) and self._wire_format.is_plain:
            rounds = LaneRounds(transport.hub)
            self._lane_calls = LaneCalls(rounds, self._parts, num_experts=self._num_experts)
        self._timings = DispatchTimings()
        self._tasks: list[asyncio.Task[None]] = []

    async def forward(
        self,
        layer: int,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        context: StepContext,
    ) -> Tensor:
        started_ns = time.perf_counter_ns()
        self._start()
        lane_call: LaneCall | None = None
        if self._lane_calls is not None:
            lane_call = self._lane_calls.begin(
                layer, hidden_states, topk_ids, topk_weights, context
            )
        gated = topk_ids, topk_weights
        return await self._complete(layer, hidden_states, gated, context, lane_call, started_ns)

    async def forward_layers(
        self, first: int, layers: StepLayers, x: Tensor, update: Tensor, context: StepContext
    ) -> LayersDone | None:
        if self._lane_calls is None:
            return None
        self._start()
        run = self._lane_calls.run_layers(first, layers, x, update, context)
        if run is None:
            return None
        prepared, request = run.prepared, run.prepared.request
        whole = slice(first, run.stop)
        self._load.add(whole, prepared.rows_per_expert[whole])
        self._timings.add_calls(run.stop - first, request.call_times_ns)
        attention_s = request.attention_ns * 1e-9
        if run.stop == len(layers.layers):
            return LayersDone(run.stop, prepared.output, attention_s)
        call, started_ns = self._lane_calls.call_of(run), request.attended_ns(run.stop)
        update = await self._complete(run.stop, *prepared.gated(), context, call, started_ns)
        return LayersDone(run.stop + 1, update, attention_s)

    async def _complete(
        self,
        layer: int,
        hidden_states: Tensor,
        gate_choice: tuple[Tensor, Tensor],
        context: StepContext,
        lane_call: LaneCall | None,
        started_ns: int,
    ) -> Tensor:
        """The layer's output, with or without a `lane_call` that was begun for it."""
        topk_ids, topk_weights = gate_choice
        calls = self._lane_calls
        if calls is not None and lane_call is not None and await calls.finish(lane_call):
            return self._take_whole(layer, lane_call, started_ns)[: len(hidden_states)]
        rows, topk_weights = on_cpu(hidden_states), on_cpu(topk_weights)
        patterns = bit_patterns(rows)
        bad = find_non_finite(rows, patterns, topk_weights)
        if bad is not None:
            rows, topk_weights = blank(rows, bad), blank(topk_weights, bad)
            patterns = bit_patterns(rows)
        gated = group_by_expert(
            on_cpu(topk_ids),
            topk_weights,
            self._num_experts,
            may_combine=not self._wire_format.narrows_answers,
        )
        self._load.add(layer, gated.rows_per_expert)
        names = None if lane_call is None else lane_call.names
        with self._telemetry.layer_span(layer, gated, context, names) as span:
            call = LayerCall(
                layer=layer,
                micro_batch=context.micro_batch,
                rows=WireRows(rows, patterns, self._wire_format),
                gated=gated,
                span=span,
                incidents=context.incidents,
            )
            dispatch = LayerDispatch(call, self._parts)
            if self._lane_calls is not None and lane_call is not None:
                self._lane_calls.hand_over(lane_call, gated, dispatch, span)
            answers = await dispatch.run()
            output = combine_frames(
                gated,
                [answered.frame for answered in answers],
                _joined_rows(answers, self._wire_format, rows.shape[1]),
            )
        if bad is not None:
            output = spoil(output, bad)
        self._count_time(started_ns, answers)
        return output if hidden_states.is_cpu else output.to(hidden_states.device)

    def take_timings(self) -> DispatchTimings:
        """Where the time of layer calls went since the last call of this."""
        return self._timings.take()

    async def wait_ready(self) -> None:
        self._start()
        give_up_at = time.monotonic() + self.expert_wait_s
        while (table := self._pool.view.table).missing_slots():
            remaining_s = give_up_at - time.monotonic()
            if remaining_s <= 0:
                break
            await self._pool.wait_changed(table.version, remaining_s)
        self.check_ready()

    def check_ready(self) -> None:
        missing = self._pool.view.table.missing_slots()
        if missing:
            raise UnavailableError(
                f"no worker holds {_described(missing)}; start one with `expertfleet expert`"
                + "".join(f"; {refusal}" for refusal in self._pool.refusals())
            )

    @property
    def expert_wait_s(self) -> float:
        return self._parts.limits.expert_wait_s

    def is_available(self, slots: Iterable[Slot]) -> bool:
        """Whether every slot has a replica that can be sent to."""
        return self._chooser.is_available(slots)

    def on_change(self, callback: Callable[[], None]) -> None:
        self._pool.subscribe(callback)

    def count_wait(self, seconds: float) -> None:
        self._telemetry.count_expert_wait(seconds)

    def slot_digests(self) -> Mapping[Slot, bytes]:
        return dict(self._pool.slot_digests)

    def expert_load(self) -> NDArray[np.int64]:
        """Assignments since start, int64 [layers, experts]."""
        return self._load.counts()

    async def close(self) -> None:
        """End all links and the registry client. Calls in flight wait for workers in vain."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._pool.close()
        await self._registry.close()

    def _take_whole(self, layer: int, call: LaneCall, started_ns: int) -> Tensor:
        request = call.request
        self._load.add(layer, request.rows_per_expert)
        sent_ns, received_ns, queue_us, compute_us = request.slowest()
        self._timings.add_call(
            started_ns=started_ns,
            sent_ns=sent_ns,
            received_ns=received_ns,
            ended_ns=time.perf_counter_ns(),
            queue_us=queue_us,
            compute_us=compute_us,
        )
        return request.output

    def _count_time(self, started_ns: int, answers: Sequence[Answered]) -> None:
        if not answers:
            return
        slowest = max(answers, key=_received_ns)
        self._timings.add_call(
            started_ns=started_ns,
            sent_ns=slowest.sent_ns,
            received_ns=slowest.received_ns,
            ended_ns=time.perf_counter_ns(),
            queue_us=slowest.response.queue_us,
            compute_us=slowest.response.compute_us,
        )

    def _start(self) -> None:
        if not self._tasks:
            self._tasks = [
                asyncio.create_task(self._follow_registry(), name="registry"),
                asyncio.create_task(self._tick(), name="workers' health"),
            ]
            for task in self._tasks:
                task.add_done_callback(log_crash)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            self._pool.tick()

    async def _follow_registry(self) -> None:
        is_away = False
        while True:
            try:
                self._pool.update(await self._registry.snapshot())
                is_away = False
            except UnavailableError as error:
                if not is_away:
                    logger.warning("going on with the last routing table: %s", error.message)
                is_away = True
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._refresh_s):
                    await self._look_again.wait()
                    await asyncio.sleep(_LOOK_AGAIN_S)
            self._look_again.clear()


def on_cpu(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_cpu else tensor.cpu()


def _joined_rows(answers: Sequence[Answered], wire_format: WireFormat, hidden_size: int) -> Tensor:
    """All answers' rows in the activation dtype, one after the other."""
    if len(answers) == 1:
        payload: bytes | memoryview = answers[0].response.payload
    else:
        payload = b"".join([answered.response.payload for answered in answers])
    num_rows = len(payload) // (hidden_size * wire_format.answer.itemsize)
    rows = tensor_from_buffer(payload, wire_format.answer, (num_rows, hidden_size))
    return rows.to(wire_format.activation) if wire_format.narrows_answers else rows


def _received_ns(answered: Answered) -> int:
    return answered.received_ns


def _described(slots: Iterable[Slot]) -> str:
    """ "expert 1 of layers 0-3, expert 2 of layers 0-1"."""
    layers_of: dict[int, list[int]] = {}
    for layer, expert in slots:
        layers_of.setdefault(expert, []).append(layer)
    return ", ".join(
        f"expert {expert} of layers {format_ranges(layers)}"
        for expert, layers in sorted(layers_of.items())
    )
