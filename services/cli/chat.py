"""`expertfleet chat` and `expertfleet complete`: talk to a running gateway."""

from __future__ import annotations

import sys
import uuid
from typing import Annotated, Any

import typer

from services.cli.gateway_client import DEFAULT_URL, GatewayClient

Url = Annotated[str, typer.Option(help="address of the gateway")]
ApiKey = Annotated[str | None, typer.Option(help="bearer key, if the gateway asks for one")]
MaxTokens = Annotated[int, typer.Option(help="longest answer, in tokens")]
Temperature = Annotated[float, typer.Option(help="0 is greedy")]
Seed = Annotated[int | None, typer.Option(help="repeatable draws")]
Session = Annotated[str | None, typer.Option(help="session whose KV cache is kept")]


def complete(
    prompt: Annotated[str, typer.Argument(help="text to continue; - reads standard input")],
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    seed: Seed = None,
    session: Session = None,
) -> None:
    """Continue a text, streaming to standard output."""
    client = GatewayClient(url, api_key)
    text = sys.stdin.read() if prompt == "-" else prompt
    body = _body(client, max_tokens, temperature, seed, session) | {"prompt": text}
    sys.stdout.write(text)
    for event in client.stream("/v1/completions", body):
        for choice in event["choices"]:
            _write(choice["text"])
    _write("\n")


def chat(
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.7,
    seed: Seed = None,
    session: Session = None,
    system: Annotated[str | None, typer.Option(help="system message")] = None,
) -> None:
    """Hold a conversation; end with Ctrl-D."""
    client = GatewayClient(url, api_key)
    session = session or f"chat-{uuid.uuid4().hex[:12]}"
    body = _body(client, max_tokens, temperature, seed, session)
    messages = [{"role": "system", "content": system}] if system else []
    _write(f"session {session}; end with Ctrl-D\n")
    while True:
        try:
            question = input("> ")
        except EOFError:
            _write("\n")
            return
        messages.append({"role": "user", "content": question})
        answer = ""
        for event in client.stream("/v1/chat/completions", body | {"messages": messages}):
            for choice in event["choices"]:
                piece = choice["delta"].get("content") or ""
                answer += piece
                _write(piece)
        _write("\n")
        messages.append({"role": "assistant", "content": answer})


def _body(
    client: GatewayClient,
    max_tokens: int,
    temperature: float,
    seed: int | None,
    session: str | None,
) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": client.model(),
        "max_tokens": max_tokens,
        "temperature": temperature,
    }
    if seed is not None:
        body["seed"] = seed
    if session is not None:
        body["session_id"] = session
    return body


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
