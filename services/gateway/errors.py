"""Errors only the gateway raises, and the one place where any error becomes an HTTP answer.

The body has OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`.
"""

from __future__ import annotations

import json
import math
import reprlib
from typing import Any

from pydantic import ValidationError
from starlette.responses import Response

from services.core.errors import (
    ExpertfleetError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    UnavailableError,
)


class UnsupportedParameterError(InvalidRequestError):
    """A field of OpenAI's schema that would change the answer, and is not served yet."""

    code = "unsupported_parameter"


class UnsupportedMediaTypeError(InvalidRequestError):
    """The body is not JSON by its Content-Type or Content-Encoding."""

    http_status = 415
    code = "unsupported_media_type"


class ModelNotFoundError(NotFoundError):
    """The request names a model that is not the one served here."""

    code = "model_not_found"


class AdministrationOffError(ExpertfleetError):
    """The gateway has no admin key, so nobody may administer through it."""

    http_status = 403
    error_type = "invalid_request_error"
    code = "administration_off"


class RequestTimeoutError(ExpertfleetError):
    """The request took longer than `request_timeout_s`."""

    http_status = 504
    code = "timeout"


class ClientDisconnectedError(Exception):
    """The client went away before its answer was complete; there is nobody left to tell."""


def http_status(error: Exception) -> int:
    return error.http_status if isinstance(error, ExpertfleetError) else 500


def error_json(error: Exception, request_id: str) -> bytes:
    """The body that tells `error`. What was not raised on purpose is named by request id only."""
    if isinstance(error, ExpertfleetError):
        return _body(error.message, error.error_type, error.code, param=error.details.get("param"))
    message = f"Internal error. The gateway's log has the cause under request id {request_id}."
    return _body(message, ExpertfleetError.error_type, ExpertfleetError.code)


def error_response(error: Exception, request_id: str) -> Response:
    headers: dict[str, str] = {}
    if isinstance(error, (OverloadedError, UnavailableError)):
        retry_after_s = float(error.details.get("retry_after_s", 1.0))
        headers["retry-after"] = str(max(1, math.ceil(retry_after_s)))
    if http_status(error) == 413:
        headers["connection"] = "close"
    return Response(
        error_json(error, request_id),
        status_code=http_status(error),
        headers=headers,
        media_type="application/json",
    )


def status_response(
    status: int, message: str, code: str, headers: dict[str, str] | None = None
) -> Response:
    """An answer for what the HTTP layer itself refuses: an unknown path, a wrong method."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return Response(
        _body(message, kind, code),
        status_code=status,
        headers=headers,
        media_type="application/json",
    )


def invalid_body(error: ValidationError) -> InvalidRequestError:
    """The first fault that pydantic found, with the field at fault as `param`."""
    first = error.errors(include_url=False)[0]
    param = _field_path(first["loc"])
    kind, message = first["type"], str(first["msg"])
    if kind == "json_invalid":
        message = message.removeprefix("Invalid JSON: ")
        return InvalidRequestError(f"The body is not valid JSON: {message}", param=None)
    if kind == "extra_forbidden":
        return UnsupportedParameterError(f"Unrecognized field: {param}", param=param)
    if kind == "missing":
        return InvalidRequestError(f"{param} is required", param=param)
    if kind == "unsupported":
        return UnsupportedParameterError(f"{param} is not supported: {message}", param=param)
    if kind == "conflict":
        field = _field_path((*first["loc"], first["ctx"]["field"]))
        return InvalidRequestError(f"{field}: {message}", param=field)
    if not param:
        return InvalidRequestError(message, param=None)
    seen = reprlib.repr(first["input"])
    return InvalidRequestError(f"{param}: {message} (got {seen})", param=param)


def _field_path(location: tuple[int | str, ...]) -> str:
    """`("messages", 0, "<string>", "content")` as "messages[0].content"; tags are left out."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith("<"):
            path += f".{part}" if path else part
    return path


def _body(message: str, kind: str, code: str, *, param: Any = None) -> bytes:
    error = {"message": message, "type": kind, "param": param, "code": code}
    return json.dumps({"error": error}, ensure_ascii=False).encode()
