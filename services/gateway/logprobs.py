"""Log-probabilities in the two shapes of OpenAI's API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from services.gateway.choice import PlacedLogprob
from services.gateway.token_bytes import TokenBytes


def completion_logprobs(
    entries: Sequence[PlacedLogprob], token_bytes: TokenBytes | None, *, num_alternatives: int
) -> dict[str, Any]:
    """`logprobs` of a `/v1/completions` choice, parallel lists over its tokens.

    `text_offset` counts characters of the choice's `text`. The alternatives include the chosen
    token. Bytes that are no text by themselves are written as `bytes:\\xe4\\xbd`.
    """
    names = [token_name(entry.token.token_id, token_bytes, "bytes:") for entry in entries]
    alternatives: list[dict[str, float]] | None = None
    if num_alternatives:
        alternatives = [
            {
                token_name(token_id, token_bytes, "bytes:"): logprob
                for token_id, logprob in e.token.top
            }
            | {name: e.token.logprob}
            for name, e in zip(names, entries, strict=True)
        ]
    return {
        "tokens": names,
        "token_logprobs": [entry.token.logprob for entry in entries],
        "top_logprobs": alternatives,
        "text_offset": [entry.text_offset for entry in entries],
    }


def chat_logprobs(
    entries: Sequence[PlacedLogprob], token_bytes: TokenBytes | None
) -> dict[str, Any]:
    """`logprobs` of a chat choice: `content` has one object a token, with its UTF-8 bytes."""
    return {
        "content": [
            _chat_token(entry.token.token_id, entry.token.logprob, token_bytes)
            | {"top_logprobs": [_chat_token(*top, token_bytes) for top in entry.token.top]}
            for entry in entries
        ],
        "refusal": None,
    }


def _chat_token(token_id: int, logprob: float, token_bytes: TokenBytes | None) -> dict[str, Any]:
    return {
        "token": token_name(token_id, token_bytes, ""),
        "logprob": logprob,
        "bytes": list(token_bytes.piece(token_id)) if token_bytes else None,
    }


def token_name(token_id: int, token_bytes: TokenBytes | None, bytes_prefix: str) -> str:
    """How a token is written: its text; its bytes, escaped, where they are none; without a
    tokeniser its id."""
    raw = token_bytes.piece(token_id) if token_bytes else b""
    if not raw:
        return f"token_id:{token_id}"
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return bytes_prefix + "".join(f"\\x{byte:02x}" for byte in raw)
