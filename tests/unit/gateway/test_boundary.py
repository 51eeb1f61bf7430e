from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from tokenizers import Tokenizer

from services.core.errors import ExpertfleetError, UnavailableError
from tests.support.fake_shard import FakeShard, repeats, says
from tests.unit.gateway.http import client_of, encode, error_of

URL = "/v1/completions"
JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("content", "headers", "status", "code"),
    [
        (b"{", JSON, 400, "invalid_value"),
        (b"", JSON, 400, "invalid_value"),
        (b"[]", JSON, 400, "invalid_value"),
        (b"\xff\xfe", JSON, 400, "invalid_value"),
        (b'{"prompt": "x", "temperature": NaN}', JSON, 400, "invalid_value"),
        (b'{"prompt": "x"}', {"content-type": "text/plain"}, 415, "unsupported_media_type"),
        (b'{"prompt": "x"}', {}, 415, "unsupported_media_type"),
        (b"x", JSON | {"content-encoding": "gzip"}, 415, "unsupported_media_type"),
        (b'{"prompt": "' + b"x" * 2000 + b'"}', JSON, 413, "request_too_large"),
        (b'{"prompt": "x", "model": "gpt-4"}', JSON, 404, "model_not_found"),
    ],
)
async def test_a_body_that_cannot_be_used_gets_an_error_in_openais_shape(
    model_folder: Path, content: bytes, headers: dict[str, str], status: int, code: str
) -> None:
    shard = FakeShard(repeats([9]))
    async with client_of(shard, model_folder, max_body_bytes=1024) as client:
        response = await client.post(URL, content=content, headers=headers)
    error = error_of(response)
    assert (response.status_code, error["code"]) == (status, code)
    assert error["type"] == "invalid_request_error"
    assert shard.requests == []


async def test_a_chunked_body_is_bounded_while_it_is_read(model_folder: Path) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 256
            yield b" " * 256

    async with client_of(FakeShard(repeats([9])), model_folder, max_body_bytes=1024) as client:
        response = await client.post(URL, content=endless(), headers=JSON)
    assert (response.status_code, error_of(response)["code"]) == (413, "request_too_large")
    assert sent <= 2048


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "not_found"),
        ("POST", "/", 405, "method_not_allowed"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("GET", "/v1/models/", 404, "model_not_found"),
        ("GET", "/v1/models/other", 404, "model_not_found"),
    ],
)
async def test_unknown_paths_and_methods_are_told_in_openais_shape(
    model_folder: Path, method: str, path: str, status: int, code: str
) -> None:
    async with client_of(FakeShard(repeats([9])), model_folder) as client:
        response = await client.request(method, path)
    assert (response.status_code, error_of(response)["code"]) == (status, code)
    assert status != 405 or response.headers["allow"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_bug_is_logged_with_the_request_id_and_kept_from_the_client(
    model_folder: Path, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    shard = FakeShard(lambda _: [KeyError("secret")])
    with caplog.at_level(logging.ERROR):
        async with client_of(shard, model_folder) as client:
            headers = {"x-request-id": "mine-1"}
            response = await client.post(
                URL, json={"prompt": "x", "stream": stream}, headers=headers
            )
    assert response.status_code == 500
    error = error_of(response)
    assert error["type"] == "server_error"
    assert "secret" not in response.text and "mine-1" in error["message"]
    (record,) = [r for r in caplog.records if r.name.startswith("services.gateway")]
    assert "mine-1" in record.getMessage() and record.exc_info


@pytest.mark.parametrize("given", [None, "abc-1", "not good!", "x" * 129])
async def test_every_answer_has_a_request_id(model_folder: Path, given: str | None) -> None:
    headers = {} if given is None else {"x-request-id": given}
    async with client_of(FakeShard(repeats([9])), model_folder) as client:
        response = await client.get("/healthz", headers=headers)
    request_id = response.headers["x-request-id"]
    assert (request_id == given) == (given == "abc-1")
    assert request_id.startswith("req-") or given == "abc-1"


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (UnavailableError("no shard"), 503, "server_error"),
        (ExpertfleetError("odd"), 500, "server_error"),
    ],
)
async def test_errors_of_the_product_keep_their_status_and_words(
    model_folder: Path, error: ExpertfleetError, status: int, kind: str
) -> None:
    async with client_of(FakeShard(lambda _: [error]), model_folder) as client:
        response = await client.post(URL, json={"prompt": "x"})
    told = error_of(response)
    assert (response.status_code, told["type"], told["message"]) == (status, kind, error.message)
    assert ("retry-after" in response.headers) == (status == 503)


async def test_a_request_is_one_span_that_goes_on_to_the_shard(
    model_folder: Path, byte_level: Tokenizer
) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    token_ids = encode(byte_level, "fox")
    shard = FakeShard(lambda _: says(token_ids, num_cached_tokens=1))
    trace_id, parent_id = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    headers = {"traceparent": f"00-{trace_id}-{parent_id}-01"}
    body: dict[str, Any] = {"prompt": [5, 6], "session_id": "s", "stream": True, "max_tokens": 5}
    async with client_of(shard, model_folder, tracer=provider.get_tracer("test")) as client:
        response = await client.post(URL, json=body, headers=headers)
        await client.get("/healthz")
    (span,) = exporter.get_finished_spans()
    assert span.name == "expertfleet.gateway.request"
    assert span.context is not None and span.parent is not None
    assert f"{span.context.trace_id:032x}" == trace_id
    assert f"{span.parent.span_id:016x}" == parent_id
    carried = shard.requests[0].trace_context["traceparent"]
    assert carried == f"00-{trace_id}-{span.context.span_id:016x}-01"
    attributes = dict(span.attributes or {})
    assert attributes["expertfleet.request_id"] == response.headers["x-request-id"]
    expected = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 1.0,
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 2,
        "gen_ai.usage.output_tokens": len(token_ids),
        "gen_ai.conversation.id": "s",
        "expertfleet.num_cached_tokens": 1,
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
    }
    assert {key: attributes.get(key) for key in expected} == expected


async def test_without_a_tracer_an_incoming_trace_still_reaches_the_shard(
    model_folder: Path,
) -> None:
    shard = FakeShard(repeats([9]))
    traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    async with client_of(shard, model_folder) as client:
        await client.post(URL, json={"prompt": "x"}, headers={"traceparent": traceparent})
        await client.post(URL, json={"prompt": "x"})
    assert shard.requests[0].trace_context["traceparent"] == traceparent
    assert shard.requests[1].trace_context == {}


async def test_keys_are_asked_for_on_the_api_and_not_by_probes(model_folder: Path) -> None:
    shard = FakeShard(repeats([9]))
    async with client_of(shard, model_folder, api_keys="alpha, beta") as client:

        async def ask(path: str, authorization: str | None) -> int:
            headers = {} if authorization is None else {"authorization": authorization}
            if path != URL:
                return (await client.get(path, headers=headers)).status_code
            response = await client.post(path, json={"prompt": "x"}, headers=headers)
            if response.status_code == 401:
                assert error_of(response)["code"] == "invalid_api_key"
            return response.status_code

        for path in (URL, "/v1/models", "/v1/experts", "/v1/sessions/s"):
            for wrong in (None, "Bearer gamma", "Basic alpha", "Bearer ", "alpha", "Bearer alph"):
                assert await ask(path, wrong) == 401
        for path in ("/healthz", "/readyz", "/metrics", "/"):
            assert await ask(path, None) == 200
        assert await ask(URL, "Bearer alpha") == 200
        assert await ask(URL, "bearer beta") == 200
        assert await ask(URL, "Bearer alpha") == 200
    alpha, beta, again = [request.tenant for request in shard.requests]
    assert alpha == again != beta
    assert "alpha" not in alpha
