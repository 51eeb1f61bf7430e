"""Requests in the engine: from their arrival to their last token. Engine's thread only."""

from __future__ import annotations

import copy
import secrets
from collections.abc import Callable, Sequence

from opentelemetry.trace import Tracer

from router_service.engine.output_stream import OutputHub, OutputStream
from router_service.engine.step_runner import MicroBatchOutcome
from router_service.engine.step_telemetry import Later, PhaseObserver, RequestTrace
from router_service.sampling.sampler import SampledToken
from router_service.scheduling.block_hash import root_hash
from router_service.scheduling.choice_record import ChoiceRecord
from router_service.scheduling.scheduler import Scheduler
from router_service.scheduling.sequence import Payload, SequenceStatus, completion_seed
from router_service.scheduling.sequence import Sequence as TokenSequence
from router_service.scheduling.step_plan import ScheduledSequence
from router_service.session_tier.checkpoint_writer import CheckpointWriter
from router_service.session_tier.session_tier import RestoreResult
from router_service.session_tier.session_writer import SessionWriter
from services.core.errors import NonFiniteError, ShardLostError
from services.core.generation import (
    FinishReason,
    GenerateRequest,
    GenerationDelta,
    ResumedChoice,
)


class ActiveRequest:
    """A request with at least one unfinished sequence. `sequences[0]` is computed first; the
    others are held until it has computed the prompt, and then share the prompt's full blocks.
    Completions that were finished when the request was resumed have no sequence."""

    __slots__ = (
        "finish_reasons",
        "holds_siblings",
        "num_local_blocks",
        "num_stored_blocks",
        "request",
        "sequences",
        "stream",
        "trace",
    )

    def __init__(
        self,
        request: GenerateRequest,
        stream: OutputStream,
        sequences: tuple[TokenSequence, ...],
        trace: RequestTrace,
    ) -> None:
        self.request = request
        self.stream = stream
        self.sequences = sequences
        self.trace = trace
        self.finish_reasons: list[FinishReason] = []
        self.holds_siblings = len(sequences) > 1
        self.num_local_blocks = 0
        """Leading blocks that were in the prefix cache at arrival; where the store is asked."""
        self.num_stored_blocks = 0
        """Leading blocks that the session store had before, for sessions: a checkpoint may go."""


class RequestTracker:
    """Turns requests into sequences, and what steps give into deltas, finishes and failures."""

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        hub: OutputHub,
        tracer: Tracer,
        model_fingerprint: bytes,
        eos_token_ids: tuple[int, ...],
        sessions: SessionWriter | None,
        checkpoints: CheckpointWriter | None = None,
        observe_phase: PhaseObserver | None = None,
        later: Later,
    ) -> None:
        self._scheduler = scheduler
        self._hub = hub
        self._tracer = tracer
        self._observe_phase = observe_phase
        self._later = later
        self._model_fingerprint = model_fingerprint
        self._eos_token_ids = frozenset(eos_token_ids)
        self._sessions = sessions
        self._checkpoints = checkpoints
        self._by_stream: dict[OutputStream, ActiveRequest] = {}
        self._by_order: dict[int, ActiveRequest] = {}
        self._next_order = 0
        self.num_prompt_tokens = 0
        self.num_prefilled_tokens = 0
        self.num_generated_tokens = 0
        self.num_cached_tokens = 0
        self.num_restored_tokens = 0
        self.num_resumed_requests = 0
        self.num_recomputed_tokens = 0

    @property
    def is_empty(self) -> bool:
        return not self._by_stream

    def trace_of(self, sequence: TokenSequence) -> RequestTrace:
        return self._by_order[sequence.order].trace

    def open(self, request: GenerateRequest, stream: OutputStream, *, now: float) -> ActiveRequest:
        """Queue a request's sequences. Raises `ContextLengthError` and `OverloadedError`, the
        latter not for a resumed request, which was admitted once. `now`: a monotonic clock's.

        Where `asks_store` says so, the caller must ask the store next, then call `restored`; until
        then the first sequence is held unless all of its blocks are here.
        """
        if request.resumed:
            self.num_resumed_requests += 1
        else:
            self._scheduler.check_admission(
                len(request.prompt_token_ids), now=now, priority=request.priority
            )
        sequences = self._make_sequences(request, arrived_at=now)
        trace = RequestTrace(self._tracer, request, self._observe_phase, later=self._later)
        active = ActiveRequest(request, stream, sequences, trace)
        leader = sequences[0]
        is_missing = False
        if self.asks_store(request):
            active.num_local_blocks = self._scheduler.count_cached_blocks(leader)
            is_missing = active.num_local_blocks < len(self.known_hashes(active))
        self._scheduler.add(leader, held=is_missing)
        block_size = self._scheduler.config.block_size
        for sibling in sequences[1:]:
            shared = min(leader.num_prompt_tokens, sibling.num_tokens - 1) // block_size
            sibling.hashes = leader.hashes[: shared + 1]
            self._scheduler.add(sibling, held=True, num_shared_tokens=shared * block_size)
        self._by_stream[stream] = active
        for sequence in sequences:
            self._by_order[sequence.order] = active
        return active

    def asks_store(self, request: GenerateRequest) -> bool:
        """Whether the store may have KV of this request: a session's, or a lost shard's."""
        is_checkpointed = self._checkpoints is not None and bool(request.resumed)
        return is_checkpointed or self._has_session(request)

    def known_hashes(self, active: ActiveRequest) -> Sequence[bytes]:
        """Hashes of the first sequence's full blocks that need not be computed if they are found:
        those of the prompt and of what a resumed request brought along."""
        leader, block_size = active.sequences[0], self._scheduler.config.block_size
        return leader.block_hashes((leader.num_tokens - 1) // block_size, block_size)

    def restored(self, active: ActiveRequest, result: RestoreResult) -> None:
        """The store has answered; its payloads continue the blocks that were here."""
        if active.stream not in self._by_stream:
            return
        num_tokens = len(result.payloads) * self._scheduler.config.block_size
        active.trace.restored(result.start_ns, result.end_ns, num_tokens)
        active.num_stored_blocks = result.num_stored
        if self._has_session(active.request):
            for sequence in active.sequences:
                if sequence.num_saved_blocks is None:
                    full = sequence.num_tokens // self._scheduler.config.block_size
                    sequence.num_saved_blocks = min(result.num_stored, full)
        elif self._checkpoints is not None:
            self._checkpoints.adopt(active.sequences[0], result.num_restorable)
        payloads: dict[int, Payload] = dict(
            enumerate(result.payloads, start=active.num_local_blocks)
        )
        self._scheduler.release_hold(active.sequences[0], payloads)

    def admitted(self, sequences: Sequence[TokenSequence]) -> None:
        """These sequences were given blocks in this step's plan."""
        for sequence in sequences:
            active = self._by_order[sequence.order]
            active.trace.scheduled()
            if sequence.num_preemptions == 0:
                self.num_prompt_tokens += sequence.num_tokens
                if active.request.resumed:
                    self.num_recomputed_tokens += sequence.num_tokens - sequence.num_cached_tokens
                self.num_cached_tokens += sequence.num_cached_tokens
                self.num_restored_tokens += sequence.num_restored_tokens

    def apply(self, outcome: MicroBatchOutcome) -> None:
        """Take in what a micro-batch gave: commit it, emit tokens, finish or fail."""
        if outcome.error is not None:
            for entry in outcome.entries:
                self._fail_owner(entry.sequence, copy.copy(outcome.error))
            return
        for entry, token in zip(outcome.entries, outcome.tokens, strict=True):
            sequence = entry.sequence
            if sequence.status is SequenceStatus.FINISHED:
                continue  # aborted during the step, or a sibling in it has failed
            if isinstance(token, NonFiniteError):
                self._fail_owner(sequence, token, culprit=sequence)
                continue
            active = self._by_order[sequence.order]
            if sequence.expert_choices is not None and entry.num_tokens:
                chosen = outcome.expert_choices[sequence.order]
                sequence.expert_choices.add(entry.start, chosen)
            self._commit(active, entry)
            if token is not None:
                self._accept(active, sequence, token)

    def abort(self, stream: OutputStream) -> None:
        """The caller has gone; nothing happens when the request has ended already."""
        active = self._by_stream.get(stream)
        if active is not None:
            self._close(active)

    def fail(self, stream: OutputStream, error: Exception) -> None:
        active = self._by_stream.get(stream)
        if active is not None:
            self._close(active, error)
        self._hub.close(stream, error)

    def fail_all(self, make_error: Callable[[], Exception]) -> None:
        for stream in tuple(self._by_stream):
            self.fail(stream, make_error())

    def checkpoint(self, step_s: float) -> None:
        """Save what there is time for after a step that took `step_s`."""
        if self._checkpoints is not None:
            self._checkpoints.save(step_s)

    def _make_sequences(
        self, request: GenerateRequest, *, arrived_at: float
    ) -> tuple[TokenSequence, ...]:
        root = root_hash(
            tenant=request.tenant,
            model_fingerprint=self._model_fingerprint,
            block_size=self._scheduler.config.block_size,
        )
        seed = request.sampling.seed
        if seed is None:
            seed = secrets.randbits(64)
        resumed = request.resumed or (ResumedChoice(),) * request.n
        unfinished = [index for index, choice in enumerate(resumed) if not choice.is_finished]
        first = self._next_order
        self._next_order += len(unfinished)
        return tuple(
            TokenSequence(
                order=order,
                index=index,
                prompt_token_ids=request.prompt_token_ids,
                sampling=request.sampling,
                seed=completion_seed(seed, index),
                root=root,
                output_token_ids=resumed[index].token_ids,
                priority=request.priority,
                arrived_at=arrived_at,
                is_resumed=bool(request.resumed),
                expert_choices=_choice_record(request, resumed[index]),
            )
            for order, index in enumerate(unfinished, start=first)
        )

    def _commit(self, active: ActiveRequest, entry: ScheduledSequence) -> None:
        sequence = entry.sequence
        self._scheduler.commit(entry)
        if entry.is_prefill:
            self.num_prefilled_tokens += entry.num_tokens
        if self._sessions is not None and self._has_session(active.request):
            self._sessions.save_new_blocks(active.request, sequence)
        elif self._checkpoints is not None:
            self._checkpoints.committed(sequence)
        if active.holds_siblings and sequence.num_computed_tokens >= sequence.num_prompt_tokens:
            self._release_siblings(active)

    def _release_siblings(self, active: ActiveRequest) -> None:
        """The prompt's full blocks are published now; who shares them need not save them again."""
        active.holds_siblings = False
        leader, block_size = active.sequences[0], self._scheduler.config.block_size
        for sibling in active.sequences[1:]:
            if sibling.status is SequenceStatus.HELD:
                if sibling.expert_choices is not None and leader.expert_choices is not None:
                    num_shared = min(leader.num_prompt_tokens, sibling.num_tokens - 1)
                    num_shared -= num_shared % block_size
                    sibling.expert_choices.adopt(leader.expert_choices, num_shared)
                if self._has_session(active.request) and leader.num_saved_blocks is not None:
                    shared = leader.num_prompt_tokens // block_size
                    sibling.num_saved_blocks = min(leader.num_saved_blocks, shared)
                self._scheduler.release_hold(sibling)

    def _has_session(self, request: GenerateRequest) -> bool:
        return self._sessions is not None and request.session_id is not None

    def _accept(
        self, active: ActiveRequest, sequence: TokenSequence, sampled: SampledToken
    ) -> None:
        """Emit one token, and finish the sequence if it was the last."""
        self.num_generated_tokens += 1
        active.trace.first_token()
        params = sequence.sampling
        token_id = sampled.token_id
        finish_reason: FinishReason | None = None
        is_stop = self._is_stop(sequence, token_id)
        if is_stop:
            finish_reason = "stop"
        else:
            sequence.append(token_id)
            if len(sequence.output_token_ids) >= params.max_tokens:
                finish_reason = "length"
        record = sequence.expert_choices
        has_logprob = params.logprobs is not None and sampled.logprob is not None and not is_stop
        self._hub.push(
            active.stream,
            GenerationDelta(
                index=sequence.index,
                token_ids=() if is_stop else (token_id,),
                logprobs=(sampled.logprob,) if has_logprob and sampled.logprob else None,
                finish_reason=finish_reason,
                stop_token_id=token_id if is_stop else None,
                num_cached_tokens=min(sequence.num_cached_tokens, sequence.num_prompt_tokens),
                num_restored_tokens=min(sequence.num_restored_tokens, sequence.num_prompt_tokens),
                expert_choices=b"" if record is None else record.take(),
            ),
        )
        if finish_reason is not None:
            self._finish(active, sequence, finish_reason)

    def _is_stop(self, sequence: TokenSequence, token_id: int) -> bool:
        params = sequence.sampling
        if len(sequence.output_token_ids) < params.min_tokens:
            return False
        if token_id in params.stop_token_ids:
            return True
        return token_id in self._eos_token_ids and not params.ignore_eos

    def _finish(
        self, active: ActiveRequest, sequence: TokenSequence, finish_reason: FinishReason
    ) -> None:
        if self._sessions is not None and self._has_session(active.request):
            self._sessions.save_last(active.request, sequence, active.num_stored_blocks)
        self._end(sequence)
        active.finish_reasons.append(finish_reason)
        if len(active.finish_reasons) == len(active.sequences):
            self._close(active)
            self._hub.close(active.stream)

    def _fail_owner(
        self, sequence: TokenSequence, error: Exception, culprit: TokenSequence | None = None
    ) -> None:
        """Fail the request of a sequence. The blocks of a `culprit` are never reused."""
        active = self._by_order.get(sequence.order)
        if active is None:
            return
        if culprit is not None:
            self._end(culprit, forget_blocks=True)
        self.fail(active.stream, error)

    def _end(
        self,
        sequence: TokenSequence,
        *,
        forget_blocks: bool = False,
        keep_checkpoint: bool = False,
    ) -> None:
        if self._checkpoints is not None and not self._has_session(
            self._by_order[sequence.order].request
        ):
            self._checkpoints.ended(sequence, forget=not keep_checkpoint)
        self._scheduler.finish(sequence, forget=forget_blocks)

    def _close(self, active: ActiveRequest, error: Exception | None = None) -> None:
        """Take a request out: its unfinished sequences, its trace, its entries here."""
        for sequence in active.sequences:
            if sequence.status is not SequenceStatus.FINISHED:
                # Lost here, it goes on elsewhere, and there its checkpoint is wanted.
                self._end(sequence, keep_checkpoint=isinstance(error, ShardLostError))
            del self._by_order[sequence.order]
        del self._by_stream[active.stream]
        reasons: list[str] = [*active.finish_reasons]
        if len(reasons) < len(active.sequences):
            reasons.append("aborted" if error is None else "error")
        active.trace.end(active.sequences, reasons, error)


def _choice_record(request: GenerateRequest, resumed: ResumedChoice) -> ChoiceRecord | None:
    """With each token that was emitted came the choices of all tokens before it."""
    if not request.return_expert_choices:
        return None
    num_emitted = len(resumed.token_ids)
    num_known = len(request.prompt_token_ids) + num_emitted - 1 if num_emitted else 0
    return ChoiceRecord(num_known)
