"""Text to token ids with the checkpoint's own `tokenizer.json`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from services.core.errors import CheckpointError
from services.gateway.token_bytes import TokenBytes

_SPECIAL_TOKEN_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "sep_token",
    "cls_token",
    "mask_token",
)
_INLINE_CHARACTERS = 4096
"""Longer texts are encoded in a thread: about a millisecond of the event loop's time."""


class TextTokenizer:
    """Encodes prompts; `token_bytes` is the way back.

    `special_tokens` are those of `tokenizer_config.json`, by the names chat templates use.
    """

    def __init__(self, tokenizer: Tokenizer, special_tokens: Mapping[str, str]) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.special_tokens = special_tokens
        self.token_bytes = TokenBytes(tokenizer)

    @classmethod
    def load(cls, folder: Path) -> TextTokenizer | None:
        """None where `folder` has no `tokenizer.json`. Raises `CheckpointError` for a bad one."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            return None
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:
            raise CheckpointError(f"{path} cannot be read: {error}", file=str(path)) from error
        return cls(tokenizer, _special_tokens(read_tokenizer_config(folder)))

    async def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        """Token ids of `text`; `add_special_tokens` runs the post-processor (BOS and the like)."""
        if len(text) <= _INLINE_CHARACTERS:
            encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
            return tuple(encoding.ids)
        return await asyncio.to_thread(self._encode_long, text, add_special_tokens)

    def _encode_long(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        # Of the library's calls, those on batches let go of the interpreter lock.
        encodings = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return tuple(encodings[0].ids)


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """`tokenizer_config.json`, or nothing where there is none."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}", file=str(path)) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} must hold a JSON object", file=str(path))
    return config


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    tokens: dict[str, str] = {}
    for name in _SPECIAL_TOKEN_NAMES:
        value = config.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            tokens[name] = content
    return tokens
