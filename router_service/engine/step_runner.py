"""One step's compute: the micro-batches' forward passes side by side, each then sampled."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from router_service.engine.batch_builder import build_batch, split_micro_batches
from router_service.engine.expert_waits import LeftBehind
from router_service.engine.micro_batch_chooser import MicroBatchChooser, StepCost, StepShape
from router_service.engine.recording_experts import RecordingExperts
from router_service.engine.step_timings import StepTimings, TimedExperts, TimesItsCalls
from router_service.experts import (
    ExpertAvailability,
    ExpertBackend,
    NothingLeftError,
    StepContext,
    StepIncidents,
    StepTrace,
)
from router_service.model.batch import ForwardBatch
from router_service.sampling.sampler import SampledToken, SamplingRow
from router_service.scheduling.sequence import SequenceStatus
from router_service.scheduling.step_plan import ScheduledSequence
from router_service.session_tier.block_transfer import BlockStorage, BlockTransfer
from services.core.errors import ExpertfleetError, NonFiniteError

_logger = logging.getLogger(__name__)


class Decoder(Protocol):
    """The model. `kv_cache` is of the type that the decoder was made for."""

    async def forward(
        self, batch: ForwardBatch, kv_cache: Any, experts: ExpertBackend, context: StepContext
    ) -> torch.Tensor: ...


class TokenSampler(Protocol):
    """Draws one token per row of `logits` float32 [R, V]; a row that cannot be drawn from gives
    its error in place of a token."""

    def sample(
        self, logits: torch.Tensor, rows: Sequence[SamplingRow]
    ) -> Sequence[SampledToken | NonFiniteError]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatchOutcome:
    """`tokens` by entry, None where the entry does not sample; or the error that all share.

    Entries in `left_behind` lacked an expert: of these, `entries` have no more than what was
    imported. `incidents` is what befell the micro-batch, where its experts tell.

    `expert_choices` are uint8 [t, layers, K] of the tokens of each entry, by the order of its
    sequence, where that wants to know them.
    """

    entries: Sequence[ScheduledSequence]
    tokens: Sequence[SampledToken | NonFiniteError | None] = ()
    error: ExpertfleetError | None = None
    left_behind: Sequence[LeftBehind] = ()
    incidents: StepIncidents | None = None
    expert_choices: Mapping[int, NDArray[np.uint8]] = field(default_factory=dict)


class StepRunner:
    """Runs the entries of a step. Nothing an entry does can disturb another micro-batch.

    `num_micro_batches` is at most so many per step, or "auto": as many as was measured to be
    fastest. In bf16 rounding may depend on it, as on everything else that changes a batch, unless
    rows are computed independently of their neighbours.
    """

    def __init__(
        self,
        *,
        decoder: Decoder,
        kv_cache: BlockStorage,
        experts: ExpertBackend,
        sampler: TokenSampler,
        block_size: int,
        device: torch.device,
        num_micro_batches: int | Literal["auto"],
        eos_token_ids: tuple[int, ...],
        transfer: BlockTransfer | None,
    ) -> None:
        self._decoder = decoder
        self._kv_cache = kv_cache
        self._experts = experts
        self._sampler = sampler
        self._block_size = block_size
        self._device = device
        self._num_micro_batches = num_micro_batches
        self._chooser = MicroBatchChooser()
        self._call_timer = experts if isinstance(experts, TimesItsCalls) else None
        self._may_leave_behind = isinstance(experts, ExpertAvailability)
        self._eos_token_ids = eos_token_ids
        self._transfer = transfer

    async def run(
        self,
        step: int,
        entries: Sequence[ScheduledSequence],
        trace: StepTrace | None,
        *,
        apply: Callable[[MicroBatchOutcome], None],
        on_dispatch: Callable[[], None],
    ) -> StepTimings:
        """Compute every entry. Raises only when this task is cancelled.

        `apply` gets a micro-batch's outcome as soon as it is there, while others still wait;
        `on_dispatch` is called whenever rows are about to be handed to the experts.
        """
        start = time.perf_counter()
        shape = _shape(entries)
        groups = split_micro_batches(entries, self._choose(shape))
        timings = StepTimings(
            num_steps=1, num_micro_batches=len(groups), num_tokens=shape.num_tokens
        )
        run = _StepRun(timings=timings, apply=apply, on_dispatch=on_dispatch)
        contexts = [
            StepContext(
                step=step,
                micro_batch=index,
                num_micro_batches=len(groups),
                trace=trace,
                incidents=StepIncidents() if self._may_leave_behind else None,
            )
            for index in range(len(groups))
        ]
        if len(groups) == 1:
            is_whole = await self._run_group(groups[0], contexts[0], run)
        else:
            pairs = zip(groups, contexts, strict=True)
            done = await asyncio.gather(*(self._run_group(*pair, run) for pair in pairs))
            is_whole = all(done)
        timings.step_s = time.perf_counter() - start
        if self._call_timer is not None:
            timings.add_calls(self._call_timer.take_timings())
        if is_whole and self._num_micro_batches == "auto":
            cost = StepCost(step_s=timings.step_s, shard_s=timings.shard_s)
            self._chooser.observe(shape, len(groups), cost)
        return timings

    def _choose(self, shape: StepShape) -> int:
        if self._num_micro_batches == "auto":
            return self._chooser.choose(shape)
        return self._num_micro_batches

    async def _run_group(
        self, group: list[ScheduledSequence], context: StepContext, run: _StepRun
    ) -> bool:
        """Whether the micro-batch came to its end."""
        outcome = await self._outcome(group, context, run)
        start = time.perf_counter()
        run.apply(outcome)
        run.timings.emit_s += time.perf_counter() - start
        return outcome.error is None and not outcome.left_behind

    async def _outcome(
        self, group: list[ScheduledSequence], context: StepContext, run: _StepRun
    ) -> MicroBatchOutcome:
        try:
            return await self._compute(group, context, run)
        except ExpertfleetError as error:
            _logger.warning("step %d: micro-batch failed: %s", context.step, error)
            return MicroBatchOutcome(entries=group, error=error)
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            return self._unexpected(group, context, error)
        except Exception as error:  # noqa: BLE001 - a process boundary: the engine goes on
            return self._unexpected(group, context, error)

    async def _compute(
        self, group: list[ScheduledSequence], context: StepContext, run: _StepRun
    ) -> MicroBatchOutcome:
        timings, start = run.timings, time.perf_counter()
        # A micro-batch begins a turn of the loop after the plan was made. Who was aborted in that
        # turn has no blocks any more, and would be written into somebody else's.
        group = [entry for entry in group if entry.sequence.status is not SequenceStatus.FINISHED]
        for entry in group:
            for block_id, payload in entry.imports:
                assert self._transfer is not None
                self._transfer.import_block(block_id, payload)
        computing = [entry for entry in group if entry.num_tokens]
        if not computing:
            return MicroBatchOutcome(entries=group, tokens=[None] * len(group))
        batch = build_batch(computing, self._block_size, self._device)
        timings.prepare_s += time.perf_counter() - start
        is_recorded = any(entry.sequence.expert_choices is not None for entry in computing)
        kind = RecordingExperts if is_recorded else TimedExperts
        experts = kind(self._experts, timings, run.on_dispatch)
        logits: torch.Tensor | None = None
        with contextlib.suppress(NothingLeftError):
            logits = await self._decoder.forward(batch, self._kv_cache, experts, context)
        experts.finish_forward()
        start = time.perf_counter()
        incidents, left_behind = context.incidents, []
        if incidents is not None and incidents.missing:
            left_behind = _left_behind(computing, batch, incidents)
            logits = _without(logits, computing, left_behind)
            group = _what_is_left(group, left_behind)
        expert_choices: Mapping[int, NDArray[np.uint8]] = {}
        if isinstance(experts, RecordingExperts) and logits is not None:
            expert_choices = _choices_by_order(computing, batch, experts.choices())
        sampling = [entry for entry in group if entry.samples]
        if sampling:
            assert logits is not None
            drawn = iter(self._sampler.sample(logits, [self._row(entry) for entry in sampling]))
            timings.sample_s += time.perf_counter() - start
        return MicroBatchOutcome(
            entries=group,
            tokens=[next(drawn) if entry.samples else None for entry in group],
            left_behind=left_behind,
            incidents=incidents,
            expert_choices=expert_choices,
        )

    def _row(self, entry: ScheduledSequence) -> SamplingRow:
        sequence = entry.sequence
        return SamplingRow(
            params=sequence.sampling,
            prompt_token_ids=sequence.prompt_token_ids,
            output_token_ids=sequence.output_token_ids,
            seed=sequence.seed,
            position=len(sequence.output_token_ids),
            eos_token_ids=self._eos_token_ids,
        )

    def _unexpected(
        self, group: list[ScheduledSequence], context: StepContext, error: BaseException
    ) -> MicroBatchOutcome:
        _logger.error("step %d failed; its requests fail", context.step, exc_info=error)
        return MicroBatchOutcome(
            entries=group,
            error=ExpertfleetError(
                f"the engine failed in step {context.step} ({type(error).__name__}); "
                "the shard's log has the traceback"
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _StepRun:
    """What the micro-batches of one step share."""

    timings: StepTimings
    apply: Callable[[MicroBatchOutcome], None]
    on_dispatch: Callable[[], None]


def _choices_by_order(
    computing: Sequence[ScheduledSequence], batch: ForwardBatch, choices: NDArray[np.uint8]
) -> dict[int, NDArray[np.uint8]]:
    """Each asking entry's rows of `choices` [T, layers, K]."""
    spans = zip(computing, batch.query_start, batch.query_start[1:], strict=False)
    return {
        entry.sequence.order: choices[first:last]
        for entry, first, last in spans
        if entry.sequence.expert_choices is not None
    }


def _left_behind(
    computing: Sequence[ScheduledSequence], batch: ForwardBatch, incidents: StepIncidents
) -> list[LeftBehind]:
    """The entries of which a row lacked an expert."""
    left = []
    for index, entry in enumerate(computing):
        missing = incidents.missing_of(batch.query_start[index], batch.query_start[index + 1])
        if missing is not None:
            left.append(LeftBehind(entry=entry, missing=missing))
    return left


def _without(
    logits: torch.Tensor | None,
    computing: Sequence[ScheduledSequence],
    left_behind: Sequence[LeftBehind],
) -> torch.Tensor | None:
    """The logits [R, V] of the sampling entries that were not left behind."""
    if logits is None:
        return None
    left = {id(item.entry) for item in left_behind}
    sampling = [entry for entry in computing if entry.samples]
    kept = [row for row, entry in enumerate(sampling) if id(entry) not in left]
    return logits[torch.tensor(kept, dtype=torch.int64, device=logits.device)]


def _what_is_left(
    group: Sequence[ScheduledSequence], left_behind: Sequence[LeftBehind]
) -> list[ScheduledSequence]:
    """The group's entries without what was left behind; imported blocks count all the same."""
    left = {id(item.entry) for item in left_behind}
    rest = []
    for entry in group:
        if id(entry) not in left:
            rest.append(entry)
        elif entry.imports:
            rest.append(dataclasses.replace(entry, num_tokens=0, samples=False))
    return rest


def _shape(entries: Sequence[ScheduledSequence]) -> StepShape:
    return StepShape(
        num_seqs=sum(1 for entry in entries if entry.num_tokens),
        num_tokens=sum(entry.num_tokens for entry in entries),
    )
