"""Chat messages to a prompt, with the checkpoint's own jinja template.

The template sees what Hugging Face's `apply_chat_template` gives it: `messages`,
`add_generation_prompt`, `tools` and `documents` (none), the special tokens, `raise_exception` and
`strftime_now`, in a sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from services.core.errors import CheckpointError, InvalidRequestError
from services.gateway.tokenizer import read_tokenizer_config

Message = Mapping[str, Any]

_RENDER_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    RecursionError,
)


class ChatTemplate:
    """One compiled template. Raises `CheckpointError` when `source` is not valid jinja."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], *, origin: str) -> None:
        self._special_tokens = dict(special_tokens)
        self._origin = origin
        self._knows_developer = "developer" in source
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(
                f"The chat template in {origin} is not valid jinja, line {error.lineno}: {error}",
                file=origin,
            ) from error

    @classmethod
    def load(cls, folder: Path, special_tokens: Mapping[str, str]) -> ChatTemplate | None:
        """`chat_template.jinja`, else `chat_template` of `tokenizer_config.json`, else None."""
        path = folder / "chat_template.jinja"
        if path.is_file():
            return cls(path.read_text(encoding="utf-8"), special_tokens, origin=str(path))
        source = _default_template(read_tokenizer_config(folder).get("chat_template"))
        if source is None:
            return None
        return cls(source, special_tokens, origin=str(folder / "tokenizer_config.json"))

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt that asks for the next assistant message.

        The role `developer` becomes `system` where the template does not know it. Raises
        `InvalidRequestError` with the template's own words when it refuses the messages.
        """
        if not self._knows_developer:
            messages = [
                {**message, "role": "system"} if message["role"] == "developer" else message
                for message in messages
            ]
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=True,
                tools=None,
                documents=None,
                **self._special_tokens,
            )
        except _RENDER_ERRORS as error:
            raise InvalidRequestError(
                f"The model's chat template refuses these messages: {error}", param="messages"
            ) from error


def _default_template(value: object) -> str | None:
    """The config's template: a string, or a list of named ones of which `default` is taken."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        for entry in value:
            if isinstance(entry, dict) and entry.get("name") == "default":
                template = entry.get("template")
                return template if isinstance(template, str) else None
    return None


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is: jinja's own filter escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().astimezone().strftime(pattern)
