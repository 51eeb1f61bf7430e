"""The engine: schedule -> forward -> sample -> emit, over and over, on a thread of its own.

The thread runs an event loop that also hosts the expert backend, so a forward pass awaits its
experts as plain coroutines do, and micro-batches are tasks side by side. Between two steps the
loop serves what has come meanwhile: submissions, aborts, answers of the session store. Callers live
on other loops; see `output_stream` for the way back to them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Literal, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from opentelemetry.trace import NoOpTracer, Tracer

from router_service.engine.deferred_emission import DeferredEmission
from router_service.engine.engine_stats import EngineMetrics, EngineStats
from router_service.engine.expert_waits import ExpertWaits
from router_service.engine.late_records import LateRecords
from router_service.engine.output_stream import OutputHub, OutputStream
from router_service.engine.request_tracker import ActiveRequest, RequestTracker
from router_service.engine.request_validation import validate_request
from router_service.engine.step_fill import StepFill
from router_service.engine.step_runner import Decoder, MicroBatchOutcome, StepRunner, TokenSampler
from router_service.engine.step_telemetry import StepSampler
from router_service.engine.step_timings import StepTimings
from router_service.experts import ExpertAvailability, ExpertBackend
from router_service.loop_thread import LoopThread
from router_service.scheduling.scheduler import Scheduler
from router_service.scheduling.sequence import SequenceStatus
from router_service.scheduling.step_plan import ScheduledStep, SchedulerConfig
from router_service.session_tier.block_transfer import BlockStorage, BlockTransfer
from router_service.session_tier.checkpoint_writer import CheckpointWriter
from router_service.session_tier.session_tier import RestoreRequest, RestoreResult, SessionTier
from router_service.session_tier.session_writer import SessionWriter
from services.core import telemetry
from services.core.errors import ExpertfleetError, ShardLostError
from services.core.expert_choices import check_expert_choices
from services.core.generation import GenerateRequest, GenerationDelta
from services.core.kernels.choice import set_num_threads
from services.core.model_config import ModelConfig

T = TypeVar("T")

_logger = logging.getLogger(__name__)


class CountingExperts(ExpertBackend, Protocol):
    """Experts that count what the gate sends them."""

    def expert_load(self) -> NDArray[np.int64]:
        """Assignments since start, int64 [layers, experts]. From any thread."""
        ...


class Engine:
    """Serves generate requests from any event loop, until it is stopped.

    `model_fingerprint` names the weights in every block hash. `thread`, if given, is where the
    experts' connections live already; the engine ends it, as it ends `experts` and `session_tier`.
    """

    def __init__(
        self,
        *,
        config: ModelConfig,
        scheduler_config: SchedulerConfig,
        decoder: Decoder,
        kv_cache: BlockStorage,
        experts: CountingExperts,
        sampler: TokenSampler,
        model_fingerprint: bytes,
        device: torch.device | str = "cpu",
        num_micro_batches: int | Literal["auto"] = 1,
        num_threads: int | None = None,
        session_tier: SessionTier | None = None,
        tracer: Tracer | None = None,
        step_sample_interval: int = 64,
        metrics: EngineMetrics | None = None,
        thread: LoopThread | None = None,
    ) -> None:
        tracer = tracer or NoOpTracer()
        block_size = scheduler_config.block_size
        self.config = config
        self._experts = experts
        self._tier = session_tier
        self._metrics = metrics
        self._num_threads = num_threads
        self._thread = thread or LoopThread("engine")
        self._scheduler = Scheduler(scheduler_config)
        self._hub = OutputHub()
        self._late_records = LateRecords()
        transfer = BlockTransfer(kv_cache, session_tier.layout) if session_tier else None
        sessions, checkpoints = _writers(session_tier, transfer, block_size)
        self._tracker = RequestTracker(
            scheduler=self._scheduler,
            hub=self._hub,
            tracer=tracer,
            model_fingerprint=model_fingerprint,
            eos_token_ids=config.eos_token_ids,
            sessions=sessions,
            checkpoints=checkpoints,
            observe_phase=metrics.observe_phase if metrics is not None else None,
            later=self._late_records.add,
        )
        self._runner = StepRunner(
            decoder=decoder,
            kv_cache=kv_cache,
            experts=experts,
            sampler=sampler,
            block_size=block_size,
            device=torch.device(device),
            num_micro_batches=num_micro_batches,
            eos_token_ids=config.eos_token_ids,
            transfer=transfer,
        )
        self._waits: ExpertWaits | None = None
        if isinstance(experts, ExpertAvailability):
            self._waits = ExpertWaits(experts, self._scheduler)
        self._wait_timer: asyncio.TimerHandle | None = None
        self._step_sampler = StepSampler(
            tracer, interval=step_sample_interval, later=self._late_records.add
        )
        self._fill = StepFill(config, scheduler_config)
        self._emission = DeferredEmission(self._emit)
        self._num_steps = 0
        self._num_micro_batches = 0
        self._timings = StepTimings()
        self._taken_timings = StepTimings()
        self._wake = asyncio.Event()
        self._drained = asyncio.Event()
        self._serving: asyncio.Task[None] | None = None
        self._is_stopping = False
        self._broken: BaseException | None = None

    @property
    def max_sequence_tokens(self) -> int:
        """Longest prompt + completion: bounded by the model and by the KV cache."""
        return self._scheduler.config.max_sequence_tokens

    def start(self) -> None:
        """Start the thread (and the session tier). Requests may come from now on."""
        if self._metrics is not None:
            self._metrics.watch(self.stats)
        if self._tier is not None:
            self._tier.start()
        self._thread.start()
        self._thread.call_soon(self._begin)

    async def stop(self, timeout_s: float = 30.0) -> None:
        """Refuse new requests, let running ones finish for `timeout_s`, give the rest back.

        Then write queued session blocks (for at most `timeout_s` again) and close the experts.
        """
        self._is_stopping = True
        if not self._thread.is_alive:
            return
        await self._thread.run(self._shut_down(timeout_s))
        if self._tier is not None:
            await self._tier.stop(timeout_s)
        await self._thread.run(self._experts.close())
        await self._thread.stop()

    async def hand_back(self, flush_s: float = 1.0) -> None:
        """Refuse new requests and give running ones back at once, as `ShardLostError`.

        Checkpoints go to the store first, for at most `flush_s`: the tokens of these requests go
        on elsewhere, from them. `stop` comes after.
        """
        self._is_stopping = True
        if self._tier is not None:
            await self._tier.flush(flush_s)
        if self._thread.is_alive:
            await self._thread.run(self._give_all_back())

    def check_alive(self) -> None:
        """Raise `ShardLostError` when the engine has died or was stopped."""
        if self._broken is not None:
            raise ShardLostError(
                f"the engine has failed ({type(self._broken).__name__}: {self._broken}); "
                "restart the shard",
                reason="unreachable",
            )
        if self._is_stopping:
            raise ShardLostError(
                "the shard is stopping; send the request to another one", reason="drained"
            )
        if not self._thread.is_alive:
            raise ShardLostError("the engine is not running", reason="unreachable")

    def check_ready(self) -> None:
        """Raise `UnavailableError` when a request could not be served now."""
        self.check_alive()
        self._experts.check_ready()

    async def generate(
        self, request: GenerateRequest
    ) -> AsyncGenerator[tuple[GenerationDelta, ...], None]:
        """Yield deltas until every completion has a finish reason; see `ShardClient.generate`.

        Raises `InvalidRequestError`, `ContextLengthError` and `OverloadedError` before the first
        delta; later `ExpertUnavailableError`, `NonFiniteError`, or another `ExpertfleetError` when
        a step failed. `ShardLostError` at any time: the engine stops or is broken, and what it had
        emitted can be resumed by another one.
        """
        self.check_alive()
        validate_request(request, vocab_size=self.config.vocab_size)
        self._scheduler.config.check_fits(
            len(request.prompt_token_ids), request.sampling.max_tokens
        )
        if request.return_expert_choices:
            longest = len(request.prompt_token_ids) + request.sampling.max_tokens
            check_expert_choices(self.config, longest * request.n)
        stream = OutputStream(asyncio.get_running_loop())
        if not self._thread.call_soon(self._submit, request, stream):
            raise ShardLostError("the engine is not running", reason="unreachable")
        try:
            while deltas := await stream.next():
                yield deltas
        finally:
            if not stream.is_closed:
                self._thread.call_soon(self._request_abort, stream)

    def stats(self) -> EngineStats:
        """From any thread; figures may be of two neighbouring steps."""
        scheduler, tracker = self._scheduler, self._tracker
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            waiting_tokens=scheduler.waiting_tokens,
            kv_blocks_used=scheduler.blocks.num_used,
            kv_blocks_total=scheduler.blocks.num_blocks,
            num_steps=self._num_steps,
            num_prompt_tokens=tracker.num_prompt_tokens,
            num_prefilled_tokens=tracker.num_prefilled_tokens,
            num_generated_tokens=tracker.num_generated_tokens,
            num_cached_tokens=tracker.num_cached_tokens,
            num_restored_tokens=tracker.num_restored_tokens,
            num_preemptions=scheduler.num_preemptions,
            num_resumed_requests=tracker.num_resumed_requests,
            num_recomputed_tokens=tracker.num_recomputed_tokens,
            expert_load=self._experts.expert_load(),
            sessions=self._tier.stats() if self._tier is not None else None,
            predicted_wait_s=scheduler.predicted_wait_s,
            num_micro_batches=self._num_micro_batches,
            timings=replace(self._timings),
        )

    def take_timings(self) -> StepTimings:
        """Where the time went since the last call. From any one thread."""
        earlier, self._taken_timings = self._taken_timings, replace(self._timings)
        return self._taken_timings.since(earlier)

    # Everything below runs on the engine's thread.

    def _begin(self) -> None:
        if self._num_threads is not None:
            set_num_threads(self._num_threads)
        if isinstance(self._experts, ExpertAvailability):
            self._experts.on_change(self._wake.set)
        self._serving = self._thread.loop.create_task(self._serve())

    def _submit(self, request: GenerateRequest, stream: OutputStream) -> None:
        try:
            self.check_alive()
            active = self._tracker.open(request, stream, now=time.perf_counter())
            if self._tier is not None and self._tracker.asks_store(request):
                self._ask_store(self._tier, active)
        except ExpertfleetError as error:
            self._hub.close(stream, error)
            self._hub.flush()
        except Exception as error:
            _logger.error("request %s could not be queued", request.request_id, exc_info=error)
            self._tracker.fail(stream, _internal_error(error))
            self._hub.flush()
        self._wake.set()

    def _ask_store(self, tier: SessionTier, active: ActiveRequest) -> None:
        hashes = self._tracker.known_hashes(active)
        room = tier.max_blocks_to_fetch(self._scheduler.restored_bytes)
        wanted = active.sequences[0].num_reusable_blocks(self._scheduler.config.block_size)
        missing = wanted - active.num_local_blocks
        question = RestoreRequest(
            hashes=hashes, num_local=active.num_local_blocks, max_blocks=min(room, missing)
        )
        tier.restore(
            question, lambda result: self._thread.call_soon(self._restored, active, result)
        )

    def _restored(self, active: ActiveRequest, result: RestoreResult) -> None:
        self._tracker.restored(active, result)
        self._wake.set()

    def _request_abort(self, stream: OutputStream) -> None:
        """Safe in the middle of a step: freed blocks are given out by the next plan only."""
        self._tracker.abort(stream)
        self._wake.set()

    async def _serve(self) -> None:
        """Step while there is work, sleep until woken while there is none."""
        try:
            with torch.inference_mode():
                while True:
                    self._wake.clear()
                    if not await self._step():
                        await self._wake.wait()
                    await asyncio.sleep(0)
        except Exception as error:
            _logger.critical("the engine has failed", exc_info=error)
            self._broken = error
            message = _internal_error(error).message
            self._tracker.fail_all(lambda: ShardLostError(message, reason="died"))
            self._emit()
            self._late_records.settle()
            self._drained.set()

    async def _step(self) -> bool:
        """One step, and False when there was nothing to do."""
        start = time.perf_counter()
        if self._tracker.is_empty:
            self._drained.set()
        if self._waits:
            self._tend_waits(self._waits)
        plan = self._scheduler.schedule()
        self._tracker.admitted(plan.admitted)
        if not plan.entries:
            self._emit()
            return False
        schedule_s = time.perf_counter() - start
        timings = await self._compute(plan)
        timings.schedule_s = schedule_s
        ended = time.perf_counter()
        self._scheduler.observe_step(plan, started_at=start, ended_at=ended)
        timings.step_s = ended - start
        timings.full_s = timings.step_s * self._fill.of(plan)
        self._timings.add(timings)
        self._emission.end_step()
        self._tracker.checkpoint(timings.step_s)
        emission_s = time.perf_counter() - ended
        self._timings.emit_s += emission_s
        self._timings.step_s += emission_s
        return True

    def _emit(self) -> None:
        """Wake the callers for whom there is something, then record what was kept for later."""
        for orphan in self._hub.flush():
            self._tracker.abort(orphan)
        self._late_records.settle_soon()

    async def _compute(self, plan: ScheduledStep) -> StepTimings:
        step = self._num_steps
        trace = self._step_sampler.begin(step, plan.entries, self._tracker.trace_of)
        try:
            timings = await self._runner.run(
                step,
                plan.entries,
                trace,
                apply=self._apply,
                on_dispatch=self._emission.dispatching,
            )
            if trace is not None:
                trace.span.set_attribute(
                    telemetry.ATTR_NUM_MICRO_BATCHES, timings.num_micro_batches
                )
        finally:
            if trace is not None:
                self._step_sampler.end(trace)
        self._num_steps += 1
        self._num_micro_batches = timings.num_micro_batches
        if self._metrics is not None:
            self._metrics.observe_step(timings.step_s, None if trace is None else trace.span)
        if self._tier is not None:
            self._observe_prefill(self._tier, plan, timings.step_s)
        return timings

    def _tend_waits(self, waits: ExpertWaits) -> None:
        """Let sequences go on whose experts are back, fail those that waited too long, and see to
        it that the next of these is not missed while nothing else happens."""
        now = time.monotonic()
        for entry, error in waits.tend(now):
            self._tracker.apply(MicroBatchOutcome(entries=(entry,), error=error))
        if self._wait_timer is not None:
            self._wait_timer.cancel()
            self._wait_timer = None
        at = waits.next_failure()
        if at is not None:
            delay_s = max(0.0, at - now) + 0.001
            self._wait_timer = self._thread.loop.call_later(delay_s, self._wake.set)

    def _note_incidents(self, outcome: MicroBatchOutcome) -> None:
        """Into the traces of the requests that were hit, and who must wait."""
        incidents, waits = outcome.incidents, self._waits
        if incidents is not None and (incidents.resends or outcome.left_behind):
            left = [item.entry for item in outcome.left_behind]
            for entry in (*outcome.entries, *left):
                if entry.sequence.status is not SequenceStatus.FINISHED:
                    self._tracker.trace_of(entry.sequence).resent(incidents.resends)
            for item in outcome.left_behind:
                if item.entry.sequence.status is not SequenceStatus.FINISHED:
                    self._tracker.trace_of(item.entry.sequence).waits_for(item.missing)
        if waits is not None:
            now = time.monotonic()
            if waits and outcome.error is None:
                advanced = [entry for entry in outcome.entries if entry.num_tokens]
                waits.advanced(advanced, now)
            for item in outcome.left_behind:
                waits.park(item, now)

    def _apply(self, outcome: MicroBatchOutcome) -> None:
        try:
            self._note_incidents(outcome)
            self._tracker.apply(outcome)
        except Exception as error:
            _logger.error("a step's result could not be used", exc_info=error)
            self._tracker.apply(
                MicroBatchOutcome(entries=outcome.entries, error=_internal_error(error))
            )

    @staticmethod
    def _observe_prefill(tier: SessionTier, plan: ScheduledStep, seconds: float) -> None:
        """Steps that mostly decode say little about how fast a prompt is computed."""
        num_prefill = sum(entry.num_tokens for entry in plan.entries if entry.is_prefill)
        num_decode = sum(1 for entry in plan.entries if not entry.is_prefill)
        if num_prefill > num_decode:
            tier.observe_prefill(num_prefill, seconds)

    async def _shut_down(self, timeout_s: float) -> None:
        self._drained.clear()
        self._wake.set()
        if self._serving is not None and not self._serving.done():
            try:
                async with asyncio.timeout(timeout_s):
                    await self._drained.wait()
            except TimeoutError:
                _logger.warning("requests did not finish within %.1f s: given back", timeout_s)
            self._serving.cancel()
            await asyncio.gather(self._serving, return_exceptions=True)
        await self._give_all_back()

    async def _give_all_back(self) -> None:
        """Safe in the middle of a step, as an abort is."""
        self._tracker.fail_all(
            lambda: ShardLostError(
                "the shard was stopped before the request finished; try again", reason="drained"
            )
        )
        self._emit()
        self._late_records.settle()
        self._wake.set()


def _writers(
    tier: SessionTier | None, transfer: BlockTransfer | None, block_size: int
) -> tuple[SessionWriter | None, CheckpointWriter | None]:
    """Who writes blocks of sessions, and of all else; see the setting `checkpoint_kv`."""
    if tier is None or transfer is None or tier.checkpoint_kv == "off":
        return None, None
    sessions = SessionWriter(tier, transfer, block_size=block_size)
    if tier.checkpoint_kv == "sessions":
        return sessions, None
    return sessions, CheckpointWriter(tier, transfer, block_size=block_size)


def _internal_error(error: BaseException) -> ExpertfleetError:
    return ExpertfleetError(
        f"the engine failed ({type(error).__name__}); the shard's log has the traceback"
    )
