"""Reading a JSON body: bounded while it is read, parsed once, faults named."""

from __future__ import annotations

import asyncio
from typing import Final, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from services.core.errors import RequestTooLargeError
from services.gateway.errors import (
    ClientDisconnectedError,
    UnsupportedMediaTypeError,
    invalid_body,
)
from services.gateway.intake import Place

MAX_INLINE_BYTES: Final = 256 << 10
"""Larger bodies are parsed in a thread. The parser keeps the interpreter lock except around the
checks that are written in Python, but those are many where bodies are slow: 80000 messages of 3 MiB
hold the event loop for 50 ms at most instead of 270."""

Body = TypeVar("Body", bound=BaseModel)


async def read_body(request: Request, schema: type[Body], max_bytes: int, place: Place) -> Body:
    """Its bytes are held at `place`. Raises `InvalidRequestError`, `UnsupportedMediaTypeError`,
    `RequestTooLargeError`, or `OverloadedError` where too much waits."""
    _check_media_type(request)
    content = await _read_bounded(request, max_bytes, place)
    try:
        if len(content) <= MAX_INLINE_BYTES:
            return schema.model_validate_json(content)
        async with place.intake.parsing:
            return await asyncio.to_thread(schema.model_validate_json, content)
    except ValidationError as error:
        raise invalid_body(error) from error


def _check_media_type(request: Request) -> None:
    given = request.headers.get("content-type", "")
    media_type = given.partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise UnsupportedMediaTypeError(
            f"The body must be JSON: send Content-Type: application/json (got {given!r})"
        )
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise UnsupportedMediaTypeError(f"Content-Encoding {encoding!r} is not taken")


async def _read_bounded(request: Request, max_bytes: int, place: Place) -> bytes:
    stated = request.headers.get("content-length", "")
    if stated.isdecimal() and int(stated) > max_bytes:
        raise _too_large(max_bytes)
    content = bytearray()
    try:
        async for chunk in request.stream():
            if len(content) + len(chunk) > max_bytes:
                raise _too_large(max_bytes)
            place.hold(len(chunk))
            content += chunk
    except ClientDisconnect as error:
        raise ClientDisconnectedError from error
    return bytes(content)


def _too_large(max_bytes: int) -> RequestTooLargeError:
    return RequestTooLargeError(f"The body is larger than {max_bytes} bytes, which is the limit")
