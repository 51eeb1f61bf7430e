"""`POST /v1/chat/completions`."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from services.gateway.answers import WholeChoice, answer
from services.gateway.auth import tenant_of
from services.gateway.body import read_body
from services.gateway.boundary import request_info
from services.gateway.choice import ChoiceUpdate, PlacedLogprob
from services.gateway.gateway import Gateway
from services.gateway.generation_request import build_generation, find_session_id
from services.gateway.logprobs import chat_logprobs
from services.gateway.schemas.chat import ChatBody
from services.gateway.served_model import ServedModel
from services.gateway.sse import dumps


def chat_router(gateway: Gateway) -> APIRouter:
    router = APIRouter(dependencies=[Depends(gateway.authenticate)])

    async def create(request: Request) -> Response:
        info = request_info(request.scope)
        place = info.place = gateway.intake.enter()
        body = await read_body(request, ChatBody, gateway.settings.max_body_bytes, place)
        gateway.model.check_name(body.model)
        messages = [message.for_template() for message in body.messages]
        prompt = await gateway.model.encode_chat(messages)
        response_id = f"chatcmpl-{uuid.uuid4().hex}"
        generation = build_generation(
            gateway,
            body,
            [prompt],
            response_id=response_id,
            tenant=tenant_of(request),
            session_id=find_session_id(request, body),
            max_tokens=body.requested_tokens,
            logprobs=body.num_alternatives,
            param="messages",
            info=info,
        )
        answer_format = ChatFormat(gateway.model, body)
        return await answer(request, gateway, body, generation, answer_format, response_id)

    router.add_api_route("/v1/chat/completions", create, methods=["POST"])
    return router


class ChatFormat:
    """Choices with a `message`; in a stream with a `delta`, of which the first names the role."""

    operation = "chat"
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def __init__(self, model: ServedModel, body: ChatBody) -> None:
        self._token_bytes = model.tokenizer.token_bytes if model.tokenizer else None
        self._has_logprobs = body.num_alternatives is not None
        self._has_token_ids = bool(body.return_token_ids)

    def whole_choice(self, index: int, choice: WholeChoice) -> dict[str, Any]:
        content: dict[str, Any] = {
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self._logprobs(choice.logprobs),
            "finish_reason": choice.finish_reason,
        }
        if self._has_token_ids:
            content["token_ids"] = choice.token_ids
        return content

    def opening(self, num_choices: int) -> Sequence[str]:
        role = {"role": "assistant", "content": "", "refusal": None}
        return [dumps(_chunk(index, role)) for index in range(num_choices)]

    def chunks(self, update: ChoiceUpdate) -> Sequence[str]:
        chunks: list[str] = []
        token_ids = update.token_ids if self._has_token_ids else ()
        if update.text or update.logprobs or token_ids:
            logprobs = self._logprobs(update.logprobs) if update.logprobs else None
            content = _chunk(update.index, {"content": update.text}, logprobs)
            if self._has_token_ids:
                content["token_ids"] = token_ids
            chunks.append(dumps(content))
        if update.finish_reason is not None:
            chunks.append(dumps(_chunk(update.index, {}, finish_reason=update.finish_reason)))
        return chunks

    def _logprobs(self, entries: Sequence[PlacedLogprob]) -> dict[str, Any] | None:
        return chat_logprobs(entries, self._token_bytes) if self._has_logprobs else None


def _chunk(
    index: int,
    delta: dict[str, Any],
    logprobs: dict[str, Any] | None = None,
    finish_reason: str | None = None,
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
