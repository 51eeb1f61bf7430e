"""Sends one request of a load test and notes when what came."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

_LONGEST_LINE = 1 << 20


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """Times in seconds of `time.perf_counter`. `error` is None for a request that ended well.

    `arrivals` has (time, tokens) of every event that brought tokens. `turn` counts from 0.
    """

    started_at: float
    prompt_tokens: int
    turn: int = 0
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    error: str | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def ttft_s(self) -> float:
        """From sending the request to its first token."""
        return self.arrivals[0][0] - self.started_at

    @property
    def tpot_s(self) -> float | None:
        """Mean time per token after the first; None for an answer of one."""
        if self.num_tokens < 2:
            return None
        return (self.arrivals[-1][0] - self.arrivals[0][0]) / (self.num_tokens - 1)

    @property
    def finished_at(self) -> float:
        return self.arrivals[-1][0] if self.arrivals else self.started_at


class LoadClient:
    """Streams completions from a gateway. Used within one event loop; close it at the end."""

    def __init__(self, url: str, *, model: str | None, api_key: str | None, timeout_s: float):
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._url = f"{url}/v1/completions"
        self._model = model
        self._http = aiohttp.ClientSession(
            headers=headers,
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=timeout_s),
            read_bufsize=_LONGEST_LINE,
        )

    async def close(self) -> None:
        await self._http.close()

    async def complete(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        session_id: str | None = None,
        turn: int = 0,
    ) -> RequestRecord:
        """Greedy, exactly `max_tokens` tokens. What goes wrong is in the record, not raised."""
        body: dict[str, Any] = {
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        if self._model is not None:
            body["model"] = self._model
        if session_id is not None:
            body["session_id"] = session_id
        record = RequestRecord(started_at=time.perf_counter(), prompt_tokens=len(prompt), turn=turn)
        try:
            async with self._http.post(self._url, json=body) as response:
                if response.status != 200:
                    record.error = f"HTTP {response.status}: {await _error_text(response)}"
                    return record
                await _read_events(response.content, record)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            record.error = f"{type(error).__name__}: {error}"
        if record.error is None and record.num_tokens != max_tokens:
            record.error = f"the stream ended after {record.num_tokens} of {max_tokens} tokens"
        return record


async def _error_text(response: aiohttp.ClientResponse) -> str:
    text = await response.text()
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:200]


async def _read_events(stream: aiohttp.StreamReader, record: RequestRecord) -> None:
    async for line in stream:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if "error" in event:
            record.error = str(event["error"].get("message", event["error"]))
            return
        token_ids = [token for choice in event["choices"] for token in choice.get("token_ids", ())]
        if token_ids:
            record.arrivals.append((time.perf_counter(), len(token_ids)))
            record.token_ids += token_ids
