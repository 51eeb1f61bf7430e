"""What the command line asks of a running gateway."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx

from services.core.errors import ExpertfleetError, UnavailableError

DEFAULT_URL = "http://127.0.0.1:8000"


class GatewayClient:
    """A thin synchronous client. Errors become `ExpertfleetError` with the gateway's own words."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._url = url
        self._http = httpx.Client(
            base_url=url, headers=headers, timeout=httpx.Timeout(5, read=None)
        )

    def get(self, path: str) -> Any:
        try:
            response = self._http.get(path)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        _check(response)
        return response.json()

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Server-sent events of a streaming completion, decoded, without the closing [DONE]."""
        try:
            with self._http.stream("POST", path, json=body | {"stream": True}) as response:
                if response.is_error:
                    response.read()
                _check(response)
                for line in response.iter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    event: dict[str, Any] = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise ExpertfleetError(event["error"]["message"])
                    yield event
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    def model(self) -> str:
        """Name of the first model served."""
        return str(self.get("/v1/models")["data"][0]["id"])

    def _unreachable(self, error: Exception) -> UnavailableError:
        return UnavailableError(
            f"no gateway answers at {self._url} ({error}); start one with 'expertfleet up' "
            "or name another with --url"
        )


def _check(response: httpx.Response) -> None:
    if response.is_success:
        return
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text[:500]
    raise ExpertfleetError(f"HTTP {response.status_code}: {message}")
