"""A gateway over a fake shard, spoken to without a socket."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
from opentelemetry import trace
from tokenizers import Tokenizer

from services.core.registry import Registry
from services.core.settings import load_settings
from services.gateway.app import create_app
from tests.support.fake_shard import FakeShard


def client_of(
    shard: FakeShard,
    model_folder: Path,
    *,
    registry: Registry | None = None,
    tracer: trace.Tracer | None = None,
    **settings: Any,
) -> httpx.AsyncClient:
    app = create_app(
        load_settings(model="org/tiny", **settings),
        shard,
        registry,
        model_folder=model_folder,
        tracer=tracer,
    )
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway")


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    token_ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return token_ids


def events_of(response: httpx.Response) -> list[Any]:
    """The parsed events of a finished stream; `[DONE]` as that string."""
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, rest = response.text.split("\n\n")
    assert rest == ""
    payloads = [event.removeprefix("data: ") for event in events]
    return [text if text == "[DONE]" else json.loads(text) for text in payloads]


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error of a refusal, after a look at its shape."""
    body = response.json()
    assert list(body) == ["error"]
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and "Traceback" not in error["message"]
    assert response.headers["x-request-id"]
    return error
