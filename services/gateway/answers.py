"""One HTTP answer from a generation: gathered whole, or as a stream of events.

The routes say how a choice is written (`AnswerFormat`); the rest is the same for both of them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from services.core.generation import FinishReason
from services.gateway.boundary import RequestInfo, request_info
from services.gateway.choice import ChoiceUpdate, PlacedLogprob
from services.gateway.disconnect import run_until_disconnect
from services.gateway.expert_choices import Gates, expert_choices_json
from services.gateway.gateway import Gateway
from services.gateway.generation import Generation
from services.gateway.generation_request import recorded
from services.gateway.schemas.common import GenerationBody
from services.gateway.served_model import ServedModel
from services.gateway.sse import DONE_EVENT, EventStreamResponse, EventTemplate, dumps
from services.gateway.usage import usage_json

_PIECE_ITEMS = 64


@dataclass(slots=True)
class WholeChoice:
    """All of a choice's updates put together."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PlacedLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    expert_choices: bytearray = field(default_factory=bytearray)


class AnswerFormat(Protocol):
    """How `/v1/completions` and `/v1/chat/completions` write their choices."""

    operation: str
    object_name: str
    chunk_name: str

    def whole_choice(self, index: int, choice: WholeChoice) -> dict[str, Any]:
        """A member of `choices`."""
        ...

    def opening(self, num_choices: int) -> Sequence[str]:
        """JSON of the choices that a stream begins with."""
        ...

    def chunks(self, update: ChoiceUpdate) -> Sequence[str]:
        """JSON of the choices, one an event, that tell `update`; often one, or none."""
        ...


async def answer(
    request: Request,
    gateway: Gateway,
    body: GenerationBody,
    generation: Generation,
    answer_format: AnswerFormat,
    response_id: str,
) -> Response:
    """Run `generation` and answer; ends with the client's connection or `request_timeout_s`."""
    info = request_info(request.scope)
    fields = {"id": response_id, "created": int(time.time()), "model": gateway.model.name}
    timeout_s = gateway.settings.request_timeout_s
    if body.stream:
        fields["object"] = answer_format.chunk_name
        template = EventTemplate(fields, has_usage=body.include_usage)
        events = _events(gateway, generation, answer_format, template, info, body.include_usage)
        return EventStreamResponse(events, info, timeout_s=timeout_s)
    work = _gather(gateway, generation, answer_format, info)
    wholes = await run_until_disconnect(request.receive, work, timeout_s=timeout_s)
    fields["object"] = answer_format.object_name
    choices = [answer_format.whole_choice(index, whole) for index, whole in enumerate(wholes)]
    content = fields | {"choices": choices, "usage": usage_json(generation.usage)}
    if body.return_expert_choices:
        # Up to a million ids: not on the event loop.
        encoded = await asyncio.to_thread(_with_experts, content, gateway.model, generation, wholes)
    else:
        encoded = dumps(content).encode()
    return Response(encoded, media_type="application/json")


async def _gather(
    gateway: Gateway, generation: Generation, answer_format: AnswerFormat, info: RequestInfo
) -> list[WholeChoice]:
    texts: list[list[str]] = [[] for _ in generation.choices]
    wholes = [WholeChoice() for _ in generation.choices]
    with recorded(gateway, generation, info, operation=answer_format.operation):
        async with aclosing(generation.updates()) as updates:
            async for batch in updates:
                for update in batch:
                    texts[update.index].append(update.text)
                    whole = wholes[update.index]
                    whole.token_ids += update.token_ids
                    whole.logprobs += update.logprobs
                    whole.finish_reason = update.finish_reason
                    whole.expert_choices += update.expert_choices
    for whole, parts in zip(wholes, texts, strict=True):
        whole.text = "".join(parts)
    return wholes


def _with_experts(
    content: dict[str, Any],
    model: ServedModel,
    generation: Generation,
    wholes: Sequence[WholeChoice],
) -> bytes:
    """The answer's JSON with `expert_choices` in every choice."""
    gates = Gates.of(model.config)
    prompts = [run.request.prompt_token_ids for run in generation.runs for _ in run.choices]
    for choice, whole, prompt in zip(content["choices"], wholes, prompts, strict=True):
        choice["expert_choices"] = expert_choices_json(
            bytes(whole.expert_choices),
            gates,
            prompt_token_ids=prompt,
            completion_token_ids=whole.token_ids,
            token_bytes=model.tokenizer.token_bytes if model.tokenizer else None,
        )
    return dumps_in_pieces(content).encode()


def dumps_in_pieces(value: Any) -> str:
    """As `dumps`, which keeps all other threads waiting while it writes, but bit by bit."""
    match value:
        case dict():
            members = (f"{dumps(name)}:{dumps_in_pieces(item)}" for name, item in value.items())
            return "{" + ",".join(members) + "}"
        case [dict(), *_]:
            return "[" + ",".join(map(dumps_in_pieces, value)) + "]"
        case list() if len(value) > _PIECE_ITEMS:
            return "[" + ",".join(map(dumps, value)) + "]"
        case _:
            return dumps(value)


async def _events(
    gateway: Gateway,
    generation: Generation,
    answer_format: AnswerFormat,
    template: EventTemplate,
    info: RequestInfo,
    include_usage: bool,
) -> AsyncGenerator[bytes, None]:
    """One chunk for all events whose tokens came together."""
    pending = [template.choice(text) for text in answer_format.opening(len(generation.choices))]
    with recorded(gateway, generation, info, operation=answer_format.operation):
        async with aclosing(generation.updates()) as updates:
            async for batch in updates:
                for update in batch:
                    pending += [template.choice(text) for text in answer_format.chunks(update)]
                if pending:
                    yield "".join(pending).encode()
                    pending = []
    if include_usage:
        yield template.usage(usage_json(generation.usage)).encode()
    yield DONE_EVENT
