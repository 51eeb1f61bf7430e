"""Answers completions at once, with made-up tokens: what `benchmarks.gateway`'s client and uvicorn
take of a request by themselves.

    python -m benchmarks.bare_http PORT
"""

from __future__ import annotations

import json
import sys
from typing import Any

import uvicorn

_EVENT = b'data: {"choices": [{"index": 0, "text": "a", "token_ids": [5]}]}\n\n'


async def application(scope: Any, receive: Any, send: Any) -> None:
    """An ASGI application; whatever is asked for is ready."""
    if scope["type"] != "http":
        return
    body, is_whole = b"", False
    while not is_whole:
        message = await receive()
        body += message.get("body", b"")
        is_whole = not message.get("more_body", False)
    num_tokens = int(json.loads(body)["max_tokens"]) if body else 0
    headers = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for _ in range(num_tokens):
        await send({"type": "http.response.body", "body": _EVENT, "more_body": True})
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


def main() -> None:
    port = int(sys.argv[1])
    uvicorn.run(
        application,
        host="127.0.0.1",
        port=port,
        log_level="error",
        lifespan="off",
        interface="asgi3",
    )


if __name__ == "__main__":
    main()
