"""How a running product is told what to do: a unix socket that takes and gives lines of JSON.

    > {"command": "restart", "what": "workers"}
    < {"progress": "expert-4 takes over from expert-0"}
    < {"result": {...}}        or        {"error": "what failed", "code": "unavailable"}

One request a connection. A caller that hangs up does not stop what it asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from services.core.errors import ExpertfleetError, InvalidRequestError, UnavailableError

Progress = Callable[[str], None]
Handler = Callable[[Mapping[str, Any], Progress], Awaitable[Mapping[str, Any]]]

_MAX_LINE_BYTES = 1 << 20
_logger = logging.getLogger(__name__)


class ControlServer:
    """Answers at `path` with `handlers`, one per command; only this user can connect."""

    def __init__(self, path: Path, handlers: Mapping[str, Handler]) -> None:
        self._path = path
        self._handlers = handlers
        self._server: asyncio.Server | None = None
        self._running: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(
            self._accept, str(self._path), limit=_MAX_LINE_BYTES
        )
        self._path.chmod(0o600)

    async def close(self) -> None:
        """Take no more requests and cancel those that run."""
        if self._server is not None:
            self._server.close()
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        self._path.unlink(missing_ok=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._answer(reader, writer), name="control")
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def tell(**fields: Any) -> None:
            if not writer.is_closing():
                writer.write(json.dumps(fields).encode() + b"\n")

        try:
            result = await self._handle(await reader.readline(), lambda text: tell(progress=text))
            tell(result=dict(result))
        except ExpertfleetError as error:
            tell(error=error.message, code=error.code)
        except ConnectionError:
            return
        except Exception as error:
            _logger.exception("a control command failed")
            tell(error=f"{type(error).__name__}: {error}", code="internal_error")
        finally:
            with contextlib.suppress(OSError):
                writer.close()
                await writer.wait_closed()

    async def _handle(self, line: bytes, progress: Progress) -> Mapping[str, Any]:
        try:
            request = json.loads(line)
            handler = self._handlers[request["command"]]
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidRequestError(
                f"not a command: {line[:80]!r}; there are {', '.join(sorted(self._handlers))}"
            ) from error
        return await handler(request, progress)


async def ask(
    path: Path, request: Mapping[str, Any], *, on_progress: Progress | None = None
) -> dict[str, Any]:
    """Send `request` to the server at `path` and return its result, however long that takes.

    Raises `ControlError` with the server's own words, `UnavailableError` when it is not there.
    """
    try:
        reader, writer = await asyncio.open_unix_connection(str(path), limit=_MAX_LINE_BYTES)
    except OSError as error:
        raise UnavailableError(f"nobody answers at {path} ({error})") from error
    try:
        writer.write(json.dumps(request).encode() + b"\n")
        while line := await reader.readline():
            answer = json.loads(line)
            if "progress" in answer:
                if on_progress is not None:
                    on_progress(str(answer["progress"]))
            elif "error" in answer:
                raise ControlError(str(answer["error"]))
            else:
                return dict(answer["result"])
    except ConnectionError as error:
        raise UnavailableError(f"the connection to {path} broke ({error})") from error
    finally:
        writer.close()
    raise UnavailableError(f"{path} was closed before the command was done")


class ControlError(ExpertfleetError):
    """The running product refused a command or could not carry it out."""

    code = "control_failed"
