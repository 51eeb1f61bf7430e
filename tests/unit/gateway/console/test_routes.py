from __future__ import annotations

from pathlib import Path

import pytest
from opentelemetry.sdk.trace import TracerProvider
from tokenizers import Tokenizer

from services.core.errors import ConfigurationError, UnavailableError
from services.core.settings import load_settings
from tests.support.fake_shard import FakeShard, repeats, says
from tests.support.records import shard_record, worker_record
from tests.unit.gateway.console.scene import FixedRegistry
from tests.unit.gateway.http import client_of, encode, error_of

KEYED = {"authorization": "Bearer secret"}
LINK = "https://traces.example/trace/{trace_id}"


async def test_the_view_needs_a_key_and_tells_the_fleet(model_folder: Path) -> None:
    registry = FixedRegistry(worker_record("a"), shard_record())
    shard = FakeShard(repeats([9]))
    async with client_of(shard, model_folder, registry=registry, api_keys="secret") as client:
        for path in ("/v1/experts/view", "/v1/experts/events"):
            refused = await client.get(path)
            assert (refused.status_code, error_of(refused)["code"]) == (401, "invalid_api_key")
        assert registry.num_reads == 0
        answer = await client.get("/v1/experts/view", headers=KEYED)
    assert answer.headers["cache-control"] == "no-store"
    view = answer.json()
    assert view["model"] == {
        "name": "tiny",
        "num_layers": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }
    assert [worker["worker_id"] for worker in view["workers"]] == ["a"]
    assert (view["store"], view["admin"], view["trace_url"]) == ("ok", False, None)
    assert view["sessions"] == {"stored": None}


async def test_a_store_that_is_away_is_told_and_no_error(model_folder: Path) -> None:
    registry = FixedRegistry()
    registry.error = UnavailableError("store away")
    shard = FakeShard(repeats([9]))
    async with client_of(shard, model_folder, registry=registry) as client:
        view = (await client.get("/v1/experts/view")).json()
    assert (view["store"], view["workers"]) == ("away", [])


async def test_requests_are_told_with_their_trace_whatever_became_of_them(
    model_folder: Path, byte_level: Tokenizer
) -> None:
    token_ids = encode(byte_level, "quick brown")
    shard = FakeShard(lambda _: says(token_ids))
    tracer = TracerProvider().get_tracer("test")
    async with client_of(
        shard, model_folder, tracer=tracer, trace_url_template=LINK, admin_key="root"
    ) as client:
        body = {"prompt": [5, 6, 7]}
        answers = [
            await client.post("/v1/completions", json=body | {"stream": streamed})
            for streamed in (False, True)
        ]
        shard.script = lambda _: [*says(token_ids)[:1], UnavailableError("gone")]
        answers.append(await client.post("/v1/completions", json=body))
        await client.post("/v1/completions", json={})
        view = (await client.get("/v1/experts/view")).json()
    assert (view["trace_url"], view["admin"]) == (LINK, True)
    assert (view["requests"]["running"], view["requests"]["waiting"]) == (0, 0)
    assert view["requests"]["ttft_ms"]["p95"] > 0
    assert view["requests"]["tpot_ms"]["p50"] >= 0
    slow = {request["request_id"]: request for request in view["slow_requests"]}
    assert set(slow) == {answer.headers["x-request-id"] for answer in answers}
    assert sorted(request["status"] for request in slow.values()) == [200, 200, 503]
    whole = slow[answers[0].headers["x-request-id"]]
    assert (whole["num_prompt_tokens"], whole["num_generated_tokens"]) == (3, len(token_ids))
    assert (whole["model"], len(whole["trace_id"])) == ("tiny", 32)
    assert 0 < whole["ttft_s"] <= whole["duration_s"]


@pytest.mark.parametrize("template", ["javascript:alert('{trace_id}')", "https://traces.example/"])
def test_a_trace_link_must_be_a_web_address_with_the_trace_in_it(template: str) -> None:
    with pytest.raises(ConfigurationError, match="EXPERTFLEET_TRACE_URL_TEMPLATE"):
        load_settings(trace_url_template=template)
