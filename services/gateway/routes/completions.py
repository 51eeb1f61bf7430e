"""`POST /v1/completions`."""

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
from services.gateway.logprobs import completion_logprobs
from services.gateway.schemas.completions import CompletionBody
from services.gateway.served_model import ServedModel
from services.gateway.sse import dumps

_DEFAULT_MAX_TOKENS = 16


def completions_router(gateway: Gateway) -> APIRouter:
    router = APIRouter(dependencies=[Depends(gateway.authenticate)])

    async def create(request: Request) -> Response:
        info = request_info(request.scope)
        place = info.place = gateway.intake.enter()
        body = await read_body(request, CompletionBody, gateway.settings.max_body_bytes, place)
        gateway.model.check_name(body.model)
        prompts = [await _prompt_tokens(gateway.model, prompt) for prompt in body.prompts]
        response_id = f"cmpl-{uuid.uuid4().hex}"
        generation = build_generation(
            gateway,
            body,
            prompts,
            response_id=response_id,
            tenant=tenant_of(request),
            session_id=find_session_id(request, body),
            max_tokens=body.max_tokens or _DEFAULT_MAX_TOKENS,
            logprobs=body.logprobs,
            param="prompt",
            info=info,
        )
        answer_format = CompletionFormat(gateway.model, body)
        return await answer(request, gateway, body, generation, answer_format, response_id)

    router.add_api_route("/v1/completions", create, methods=["POST"])
    return router


async def _prompt_tokens(model: ServedModel, prompt: str | list[int]) -> tuple[int, ...]:
    if isinstance(prompt, str):
        return await model.encode_text(prompt, param="prompt")
    return model.check_prompt(tuple(prompt), param="prompt")


class CompletionFormat:
    """Choices with `text`; with `echo` the prompt stands before it."""

    operation = "text_completion"
    object_name = chunk_name = "text_completion"

    def __init__(self, model: ServedModel, body: CompletionBody) -> None:
        self._token_bytes = model.tokenizer.token_bytes if model.tokenizer else None
        self._num_alternatives = body.logprobs
        self._has_token_ids = bool(body.return_token_ids)
        self._echo = [_prompt_text(model, prompt) for prompt in body.prompts] if body.echo else []
        self._n = body.num_choices_per_prompt

    def whole_choice(self, index: int, choice: WholeChoice) -> dict[str, Any]:
        content: dict[str, Any] = {
            "index": index,
            "text": self._echo_of(index) + choice.text,
            "logprobs": self._logprobs(choice.logprobs),
            "finish_reason": choice.finish_reason,
        }
        if self._has_token_ids:
            content["token_ids"] = choice.token_ids
        return content

    def opening(self, num_choices: int) -> Sequence[str]:
        if not self._echo:
            return ()
        return [
            self.chunks(ChoiceUpdate(index=index, text=self._echo_of(index)))[0]
            for index in range(num_choices)
        ]

    def chunks(self, update: ChoiceUpdate) -> Sequence[str]:
        has_news = not update.is_empty or (self._has_token_ids and update.token_ids)
        if not has_news:
            return ()
        content: dict[str, Any] = {
            "index": update.index,
            "text": update.text,
            "logprobs": self._logprobs(update.logprobs) if update.logprobs else None,
            "finish_reason": update.finish_reason,
        }
        if self._has_token_ids:
            content["token_ids"] = update.token_ids
        return (dumps(content),)

    def _echo_of(self, index: int) -> str:
        return self._echo[index // self._n] if self._echo else ""

    def _logprobs(self, entries: Sequence[PlacedLogprob]) -> dict[str, Any] | None:
        if self._num_alternatives is None:
            return None
        return completion_logprobs(
            entries, self._token_bytes, num_alternatives=self._num_alternatives
        )


def _prompt_text(model: ServedModel, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else model.decode(tuple(prompt))
