"""What gateway and shard say to each other (`services/core/generation.py`) as protobuf messages."""

from __future__ import annotations

import json
from collections.abc import Iterator

from protos import shards_pb2
from services.core.errors import ExpertfleetError
from services.core.generation import (
    FinishReason,
    GenerateRequest,
    GenerationDelta,
    ResumedChoice,
    SamplingParams,
    SessionInfo,
    TokenLogprob,
)

_TO_PROTO: dict[FinishReason | None, shards_pb2.FinishReason] = {
    None: shards_pb2.FINISH_REASON_UNSPECIFIED,
    "stop": shards_pb2.FINISH_REASON_STOP,
    "length": shards_pb2.FINISH_REASON_LENGTH,
}
_FROM_PROTO = {number: reason for reason, number in _TO_PROTO.items()}
_SEED_MASK = 2**64 - 1


def request_to_proto(request: GenerateRequest) -> shards_pb2.GenerateRequest:
    return shards_pb2.GenerateRequest(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        sampling=_sampling_to_proto(request.sampling),
        n=request.n,
        tenant=request.tenant,
        session_id=request.session_id,
        session_ttl_s=request.session_ttl_s,
        trace_context=request.trace_context,
        resumed=[
            shards_pb2.ResumedChoice(token_ids=choice.token_ids, is_finished=choice.is_finished)
            for choice in request.resumed
        ],
        priority=request.priority,
        return_expert_choices=request.return_expert_choices,
    )


def request_from_proto(message: shards_pb2.GenerateRequest) -> GenerateRequest:
    return GenerateRequest(
        request_id=message.request_id,
        prompt_token_ids=tuple(message.prompt_token_ids),
        sampling=_sampling_from_proto(message.sampling),
        n=message.n,
        tenant=message.tenant,
        session_id=message.session_id if message.HasField("session_id") else None,
        session_ttl_s=message.session_ttl_s if message.HasField("session_ttl_s") else None,
        trace_context=dict(message.trace_context),
        resumed=tuple(
            ResumedChoice(token_ids=tuple(choice.token_ids), is_finished=choice.is_finished)
            for choice in message.resumed
        ),
        priority=message.priority,
        return_expert_choices=message.return_expert_choices,
    )


def _sampling_to_proto(params: SamplingParams) -> shards_pb2.SamplingParams:
    return shards_pb2.SamplingParams(
        max_tokens=params.max_tokens,
        min_tokens=params.min_tokens,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        seed=None if params.seed is None else params.seed & _SEED_MASK,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
        logit_bias=params.logit_bias,
        logprobs=params.logprobs,
    )


def _sampling_from_proto(message: shards_pb2.SamplingParams) -> SamplingParams:
    return SamplingParams(
        max_tokens=message.max_tokens,
        min_tokens=message.min_tokens,
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        seed=message.seed if message.HasField("seed") else None,
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        logit_bias=dict(message.logit_bias),
        logprobs=message.logprobs if message.HasField("logprobs") else None,
    )


def delta_to_proto(delta: GenerationDelta) -> shards_pb2.GenerationDelta:
    return shards_pb2.GenerationDelta(
        index=delta.index,
        token_ids=delta.token_ids,
        logprobs=[_logprob_to_proto(logprob) for logprob in delta.logprobs or ()],
        finish_reason=_TO_PROTO[delta.finish_reason],
        stop_token_id=delta.stop_token_id,
        num_cached_tokens=delta.num_cached_tokens,
        num_restored_tokens=delta.num_restored_tokens,
        expert_choices=delta.expert_choices,
    )


def delta_from_proto(message: shards_pb2.GenerationDelta) -> GenerationDelta:
    return GenerationDelta(
        index=message.index,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(_logprobs_from_proto(message)) or None,
        finish_reason=_FROM_PROTO[message.finish_reason],
        stop_token_id=message.stop_token_id if message.HasField("stop_token_id") else None,
        num_cached_tokens=message.num_cached_tokens,
        num_restored_tokens=message.num_restored_tokens,
        expert_choices=message.expert_choices,
    )


def _logprob_to_proto(logprob: TokenLogprob) -> shards_pb2.TokenLogprob:
    return shards_pb2.TokenLogprob(
        token_id=logprob.token_id,
        logprob=logprob.logprob,
        top_token_ids=[token_id for token_id, _ in logprob.top],
        top_logprobs=[value for _, value in logprob.top],
    )


def _logprobs_from_proto(message: shards_pb2.GenerationDelta) -> Iterator[TokenLogprob]:
    for logprob in message.logprobs:
        yield TokenLogprob(
            token_id=logprob.token_id,
            logprob=logprob.logprob,
            top=tuple(zip(logprob.top_token_ids, logprob.top_logprobs, strict=True)),
        )


def error_to_proto(error: ExpertfleetError) -> shards_pb2.ErrorStatus:
    return shards_pb2.ErrorStatus(
        code=error.code, message=error.message, details=json.dumps(error.details, default=str)
    )


def error_from_proto(message: shards_pb2.ErrorStatus) -> ExpertfleetError:
    """The error as the shard raised it; one of an unknown code is a plain `ExpertfleetError`."""
    kind = next((k for k in _kinds(ExpertfleetError) if k.code == message.code), ExpertfleetError)
    return kind(message.message, **json.loads(message.details or "{}"))


def _kinds(kind: type[ExpertfleetError]) -> Iterator[type[ExpertfleetError]]:
    yield kind
    for subclass in kind.__subclasses__():
        yield from _kinds(subclass)


def session_to_proto(info: SessionInfo | None) -> shards_pb2.SessionState:
    if info is None:
        return shards_pb2.SessionState(found=False)
    return shards_pb2.SessionState(
        found=True,
        num_tokens=info.num_tokens,
        num_blocks=info.num_blocks,
        stored_bytes=info.stored_bytes,
        created_at=info.created_at,
        updated_at=info.updated_at,
        expires_at=info.expires_at,
    )


def session_from_proto(
    message: shards_pb2.SessionState, tenant: str, session_id: str
) -> SessionInfo | None:
    if not message.found:
        return None
    return SessionInfo(
        session_id=session_id,
        tenant=tenant,
        num_tokens=message.num_tokens,
        num_blocks=message.num_blocks,
        stored_bytes=message.stored_bytes,
        created_at=message.created_at,
        updated_at=message.updated_at,
        expires_at=message.expires_at,
    )
