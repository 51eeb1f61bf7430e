"""From a parsed body and its prompts to a `Generation`, and its record when it is over."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from starlette.requests import Request

from services.core import telemetry
from services.core.errors import InvalidRequestError
from services.core.expert_choices import check_expert_choices
from services.core.generation import GenerateRequest
from services.core.tracing import span_carrier
from services.gateway.boundary import RequestInfo
from services.gateway.choice import Choice
from services.gateway.console.activity import Served
from services.gateway.gateway import Gateway
from services.gateway.generation import Generation, PromptRun
from services.gateway.resubmission import Resubmission
from services.gateway.sampling import build_sampling, fit_max_tokens
from services.gateway.schemas.common import SESSION_ID_PATTERN, GenerationBody

SESSION_HEADER = "x-session-id"

_logger = logging.getLogger(__name__)


def build_generation(
    gateway: Gateway,
    body: GenerationBody,
    prompts: Sequence[tuple[int, ...]],
    *,
    response_id: str,
    tenant: str,
    session_id: str | None,
    max_tokens: int | None,
    logprobs: int | None,
    param: str,
    info: RequestInfo,
) -> Generation:
    """`max_tokens` None: what the context leaves. `param` names the field the prompts came from.

    Raises `InvalidRequestError` before anything is asked of the shard.
    """
    if session_id is None and body.session_ttl_s is not None:
        raise InvalidRequestError("session_ttl_s needs a session_id", param="session_ttl_s")
    if session_id is not None and len(prompts) > 1:
        raise InvalidRequestError("A session takes one prompt at a time", param="session_id")
    model, carrier = gateway.model, span_carrier(info.span)
    runs: list[PromptRun] = []
    for position, token_ids in enumerate(prompts):
        limit = fit_max_tokens(len(token_ids), max_tokens, model.max_model_len, param=param)
        request = GenerateRequest(
            request_id=response_id if len(prompts) == 1 else f"{response_id}-{position}",
            prompt_token_ids=token_ids,
            sampling=build_sampling(
                body, max_tokens=limit, logprobs=logprobs, vocab_size=model.config.vocab_size
            ),
            n=body.num_choices_per_prompt,
            tenant=tenant,
            session_id=session_id,
            session_ttl_s=body.session_ttl_s,
            trace_context=carrier,
            priority=body.priority or 0,
            return_expert_choices=bool(body.return_expert_choices),
        )
        choices = [
            Choice(
                position * request.n + index,
                model.detokenizer(token_ids),
                body.stop_strings,
                min_tokens=request.sampling.min_tokens,
            )
            for index in range(request.n)
        ]
        runs.append(PromptRun(request, choices, _observer(gateway, info)))
    if body.return_expert_choices:
        requests = [run.request for run in runs]
        longest = [len(r.prompt_token_ids) + r.sampling.max_tokens for r in requests]
        check_expert_choices(model.config, sum(longest) * body.num_choices_per_prompt)
    return Generation(gateway.shards, runs, info.stop_waiting)


def _observer(gateway: Gateway, info: RequestInfo) -> Callable[[Resubmission], None]:
    """Puts the loss of a shard into the metrics, the log and the request's span."""

    def observe(resubmission: Resubmission) -> None:
        gateway.metrics.observe_resubmission(resubmission.reason)
        _logger.warning(
            "request %s lost its shard (%s) after %d tokens; attempt %d",
            info.request_id,
            resubmission.reason,
            resubmission.num_tokens,
            resubmission.attempt + 1,
        )
        info.span.add_event(
            telemetry.EVENT_RESUBMITTED,
            {
                telemetry.ATTR_ATTEMPT: resubmission.attempt,
                telemetry.ATTR_LOSS_REASON: resubmission.reason,
                telemetry.ATTR_NUM_TOKENS: resubmission.num_tokens,
            },
        )

    return observe


def find_session_id(request: Request, body: GenerationBody) -> str | None:
    """The session of the body's `session_id` or of the header `X-Session-Id`."""
    in_header = request.headers.get(SESSION_HEADER)
    if in_header is None:
        return body.session_id
    if not re.fullmatch(SESSION_ID_PATTERN, in_header):
        raise InvalidRequestError(
            f"The header X-Session-Id must match {SESSION_ID_PATTERN} (got {in_header!r})",
            param="X-Session-Id",
        )
    if body.session_id is not None and body.session_id != in_header:
        raise InvalidRequestError(
            f"session_id {body.session_id!r} and the header X-Session-Id {in_header!r} differ",
            param="session_id",
        )
    return in_header


@contextmanager
def recorded(
    gateway: Gateway, generation: Generation, info: RequestInfo, *, operation: str
) -> Iterator[None]:
    """Put the generation into metrics and into the request's span when it is over, well or not."""
    try:
        yield
    finally:
        gateway.metrics.observe_generation(generation, info.started_at, info.span)
        info.served = _served(gateway, generation, info)
        if info.span.is_recording():
            info.span.set_attributes(_span_attributes(gateway, generation, operation))


def _served(gateway: Gateway, generation: Generation, info: RequestInfo) -> Served:
    usage, first_at, last_at = generation.usage, generation.first_token_at, generation.last_token_at
    ttft_s = tpot_s = None
    if first_at is not None and last_at is not None:
        ttft_s = first_at - info.started_at
        num_intervals = max(choice.num_tokens for choice in generation.choices) - 1
        tpot_s = (last_at - first_at) / num_intervals if num_intervals > 0 else None
    return Served(
        model=gateway.model.name,
        num_prompt_tokens=usage.prompt_tokens,
        num_generated_tokens=usage.completion_tokens,
        ttft_s=ttft_s,
        tpot_s=tpot_s,
    )


def _span_attributes(
    gateway: Gateway, generation: Generation, operation: str
) -> dict[str, str | int | float | list[str]]:
    request, usage = generation.runs[0].request, generation.usage
    attributes: dict[str, str | int | float | list[str]] = {
        telemetry.GEN_AI_OPERATION_NAME: operation,
        telemetry.GEN_AI_REQUEST_MODEL: gateway.model.name,
        telemetry.GEN_AI_REQUEST_MAX_TOKENS: request.sampling.max_tokens,
        telemetry.GEN_AI_REQUEST_TEMPERATURE: request.sampling.temperature,
        telemetry.GEN_AI_RESPONSE_ID: request.request_id,
        telemetry.GEN_AI_RESPONSE_FINISH_REASONS: [
            choice.finish_reason or "aborted" for choice in generation.choices
        ],
        telemetry.GEN_AI_USAGE_INPUT_TOKENS: usage.prompt_tokens,
        telemetry.GEN_AI_USAGE_OUTPUT_TOKENS: usage.completion_tokens,
        telemetry.ATTR_NUM_CACHED_TOKENS: usage.cached_tokens,
        telemetry.ATTR_NUM_RESTORED_TOKENS: usage.restored_tokens,
    }
    if request.session_id is not None:
        attributes[telemetry.GEN_AI_CONVERSATION_ID] = request.session_id
    return attributes
