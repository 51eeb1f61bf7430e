from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as open_metrics_families,
)
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import Tokenizer

from services.core.errors import OverloadedError, UnavailableError
from services.core.generation import SessionInfo
from services.core.registry import FleetSnapshot, ShardRecord, WorkerRecord
from tests.support.fake_shard import FakeShard, repeats, says
from tests.unit.gateway.http import client_of, encode, error_of


class FixedRegistry:
    """A registry whose snapshot the test sets."""

    def __init__(self, snapshot: FleetSnapshot) -> None:
        self.current: FleetSnapshot | Exception = snapshot

    async def publish(self, record: WorkerRecord | ShardRecord, lease_s: float) -> None:
        raise NotImplementedError

    async def remove(self, record_id: str) -> None:
        raise NotImplementedError

    async def snapshot(self) -> FleetSnapshot:
        if isinstance(self.current, Exception):
            raise self.current
        return self.current

    async def close(self) -> None:
        return


def worker(name: str, experts: set[int], *, state: str = "ready") -> WorkerRecord:
    return WorkerRecord(
        worker_id=name,
        endpoint=f"127.0.0.1:{len(name)}",
        state=state,  # type: ignore[arg-type]
        slots=frozenset((layer, expert) for layer in range(2) for expert in experts),
        device="cpu",
        pid=1,
        host="here",
        started_at=5.0,
        weight_bytes=1000,
        memory_free_bytes=2000,
        queue_ms=0.5,
        compute_ms=1.5,
        tokens={(0, expert): 10 for expert in experts},
        num_frames=3,
    )


def shard_record(load: dict[tuple[int, int], int]) -> ShardRecord:
    return ShardRecord(
        shard_id="shard-0",
        pid=2,
        host="here",
        started_at=5.0,
        num_running=1,
        num_waiting=2,
        waiting_tokens=30,
        kv_blocks_used=4,
        kv_blocks_total=64,
        num_generated_tokens=7,
        num_prefilled_tokens=8,
        expert_load=load,
    )


async def metrics_of(
    client: httpx.AsyncClient,
) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


async def test_liveness_needs_no_shard_and_readiness_says_what_is_missing(
    model_folder: Path,
) -> None:
    shard = FakeShard(repeats([9]))
    shard.not_ready = UnavailableError("expert 3 of layer 1 has no worker")
    async with client_of(shard, model_folder) as client:
        assert (await client.get("/healthz")).status_code == 200
        response = await client.get("/readyz")
        assert response.status_code == 503
        assert "expert 3 of layer 1" in error_of(response)["message"]
        shard.not_ready = None
        assert (await client.get("/readyz")).json() == {"status": "ready"}


async def test_the_served_model_is_listed(model_folder: Path) -> None:
    async with client_of(FakeShard(repeats([9])), model_folder) as client:
        (listed,) = (await client.get("/v1/models")).json()["data"]
        assert (await client.get("/v1/models/tiny")).json() == listed
        index = (await client.get("/", headers={"accept": "application/json"})).json()
    assert (listed["id"], listed["object"], listed["max_model_len"]) == ("tiny", "model", 256)
    assert "/v1/chat/completions" in index["endpoints"]


async def test_a_session_can_be_seen_and_forgotten_by_its_tenant_alone(model_folder: Path) -> None:
    shard = FakeShard(repeats([9]))
    shard.sessions["default", "chat-1"] = SessionInfo(
        session_id="chat-1",
        tenant="default",
        num_tokens=160,
        num_blocks=10,
        stored_bytes=4096,
        created_at=1.0,
        updated_at=2.0,
        expires_at=3.0,
    )
    shard.sessions["other", "chat-2"] = shard.sessions["default", "chat-1"]
    async with client_of(shard, model_folder) as client:
        told = (await client.get("/v1/sessions/chat-1")).json()
        assert (told["id"], told["num_tokens"], told["expires_at"]) == ("chat-1", 160, 3.0)
        assert "tenant" not in told
        assert (await client.delete("/v1/sessions/chat-1")).json()["deleted"] is True
        for method, name in (("GET", "chat-1"), ("DELETE", "chat-1"), ("GET", "chat-2")):
            response = await client.request(method, f"/v1/sessions/{name}")
            assert response.status_code == 404
            assert error_of(response)["param"] == "session_id"


async def test_the_experts_page_has_topology_and_load(model_folder: Path) -> None:
    load = {(0, 0): 30, (0, 1): 10, (1, 3): 40}
    workers = (worker("a", {0, 1}), worker("bb", {2}), worker("ccc", {3}, state="draining"))
    registry = FixedRegistry(FleetSnapshot(workers=workers, shards=(shard_record(load),)))
    async with client_of(FakeShard(repeats([9])), model_folder, registry=registry) as client:
        page = (await client.get("/v1/experts")).json()
    assert (page["num_layers"], page["num_experts"], page["num_experts_per_tok"]) == (2, 4, 2)
    assert [w["worker_id"] for w in page["workers"]] == ["a", "bb", "ccc"]
    first = page["workers"][0]
    assert first["slots"] == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert (first["experts"], first["tokens"], first["compute_ms"]) == ([0, 1], 20, 1.5)
    assert (page["shards"][0]["num_waiting"], page["shards"][0]["kv_blocks_total"]) == (2, 64)
    assert page["missing"] == [[0, 3], [1, 3]]
    assert (page["load"]["source"], page["load"]["total_tokens"]) == ("shards", 80)
    top, bottom = page["load"]["layers"]
    assert (top["tokens"], top["share"]) == ([30, 10, 0, 0], [0.75, 0.25, 0, 0])
    assert (top["imbalance"], bottom["imbalance"]) == (3.0, 4.0)
    assert top["tokens_per_second"] is None


async def test_without_a_registry_the_experts_page_is_empty(model_folder: Path) -> None:
    async with client_of(FakeShard(repeats([9])), model_folder) as client:
        page = (await client.get("/v1/experts")).json()
    assert (page["workers"], page["shards"], page["missing"]) == ([], [], [])
    assert page["load"]["layers"][0]["imbalance"] is None


async def test_requests_and_latencies_are_counted(
    model_folder: Path, byte_level: Tokenizer
) -> None:
    token_ids = encode(byte_level, "quick brown")
    shard = FakeShard(lambda _: says(token_ids))
    body = {"prompt": [5, 6, 7]}
    async with client_of(shard, model_folder) as client:
        await client.post("/v1/completions", json=body)
        await client.post("/v1/completions", json=body | {"stream": True})
        await client.post("/v1/completions", json={})
        shard.script = lambda _: [*says(token_ids)[:1], OverloadedError("full")]
        await client.post("/v1/completions", json=body | {"stream": True})
        await client.get("/somewhere/else")
        counted = await metrics_of(client)

    def requests(route: str, status: str) -> float:
        labels = frozenset({("route", route), ("status", status)})
        return counted["expertfleet_requests_total", labels]

    assert requests("/v1/completions", "200") == 2
    assert requests("/v1/completions", "400") == 1
    assert requests("/v1/completions", "429") == 1
    assert requests("unknown", "404") == 1
    none: frozenset[tuple[str, str]] = frozenset()
    assert counted["expertfleet_time_to_first_token_seconds_count", none] == 3
    assert counted["expertfleet_time_per_output_token_seconds_count", none] == 2
    route = frozenset({("route", "/v1/completions")})
    assert counted["expertfleet_request_duration_seconds_count", route] == 4


async def test_tokens_per_expert_are_counted_and_outlive_the_registry(model_folder: Path) -> None:
    registry = FixedRegistry(FleetSnapshot(shards=(shard_record({(1, 3): 40}),)))
    key = ("expertfleet_fleet_expert_tokens_total", frozenset({("layer", "1"), ("expert", "3")}))
    async with client_of(FakeShard(repeats([9])), model_folder, registry=registry) as client:
        assert (await metrics_of(client))[key] == 40
        registry.current = UnavailableError("store away")
        assert (await metrics_of(client))[key] == 40
        response = await client.get("/v1/experts")
        assert (response.status_code, error_of(response)["message"]) == (503, "store away")


async def test_tokens_of_shards_that_are_gone_stay_counted(model_folder: Path) -> None:
    first, second = shard_record({(1, 3): 40}), shard_record({(1, 3): 5})
    second = replace(second, shard_id="shard-later", started_at=1.0)
    registry = FixedRegistry(FleetSnapshot())
    key = ("expertfleet_fleet_expert_tokens_total", frozenset({("layer", "1"), ("expert", "3")}))
    counted = []
    async with client_of(FakeShard(repeats([9])), model_folder, registry=registry) as client:
        for shards in (
            (first, second),
            (replace(first, expert_load={(1, 3): 42}), second),
            (second,),
            (replace(second, expert_load={(1, 3): 8}),),
            (replace(first, expert_load={(1, 3): 43}), second),
        ):
            registry.current = FleetSnapshot(shards=shards)
            counted.append((await metrics_of(client))[key])
    assert counted == [45, 47, 47, 50, 51]


async def test_the_fleet_is_told_as_leases_tell_it(model_folder: Path) -> None:
    workers = (worker("a", {0, 1}), worker("bb", {1, 2}), worker("ccc", {3}, state="draining"))
    snapshot = FleetSnapshot(workers=workers, shards=(shard_record({}),))
    registry = FixedRegistry(snapshot)

    def replicas(counted: dict[tuple[str, frozenset[tuple[str, str]]], float]) -> list[float]:
        return [
            counted["expertfleet_fleet_expert_replicas", frozenset(labels.items())]
            for expert in range(4)
            for labels in [{"layer": "1", "expert": str(expert)}]
        ]

    none: frozenset[tuple[str, str]] = frozenset()
    ready = frozenset({("state", "ready")})
    async with client_of(FakeShard(repeats([9])), model_folder, registry=registry) as client:
        counted = await metrics_of(client)
        assert replicas(counted) == [1, 2, 1, 0]
        assert counted["expertfleet_fleet_workers", ready] == 2
        assert counted["expertfleet_fleet_workers", frozenset({("state", "draining")})] == 1
        assert counted["expertfleet_fleet_shards", none] == 1
        assert counted["expertfleet_store_up", none] == 1
        registry.current = UnavailableError("store away")
        counted = await metrics_of(client)
        assert counted["expertfleet_store_up", none] == 0
        assert replicas(counted) == [1, 2, 1, 0], "what was last seen stands"
        registry.current = FleetSnapshot()
        counted = await metrics_of(client)
        assert replicas(counted) == [0] * 4, "workers are all gone, not inside the shards"
        assert counted["expertfleet_store_up", none] == 1
        assert counted["expertfleet_fleet_shards", none] == 0


async def test_without_workers_or_without_a_store_nothing_is_told_to_be_missing(
    model_folder: Path,
) -> None:
    registry = FixedRegistry(FleetSnapshot(shards=(shard_record({}),)))
    async with (
        client_of(FakeShard(repeats([9])), model_folder, registry=registry) as inside,
        client_of(FakeShard(repeats([9])), model_folder) as alone,
    ):
        names = {name for name, _ in await metrics_of(inside)}
        assert "expertfleet_fleet_expert_replicas" not in names
        assert "expertfleet_fleet_shards" in names
        names = {name for name, _ in await metrics_of(alone)}
        assert not any(
            name.startswith(("expertfleet_fleet_", "expertfleet_store")) for name in names
        )


@pytest.mark.parametrize("ratio", [1.0, 0.0])
async def test_latencies_lead_to_the_traces_of_sampled_requests(
    model_folder: Path, byte_level: Tokenizer, ratio: float
) -> None:
    token_ids = encode(byte_level, "quick brown")
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    tracer = TracerProvider(sampler=ParentBased(TraceIdRatioBased(ratio))).get_tracer("test")
    # A caller who samples decides for its own request; without one the ratio does.
    headers = {"traceparent": f"00-{trace_id}-00f067aa0ba902b7-01"} if ratio else {}
    shard = FakeShard(lambda _: says(token_ids))
    async with client_of(shard, model_folder, tracer=tracer) as client:
        body = {"prompt": [5, 6, 7]}
        response = await client.post("/v1/completions", json=body, headers=headers)
        assert response.is_success
        # As Prometheus asks when it stores exemplars, and when it does not.
        accept = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3"
        open_metrics = await client.get("/metrics", headers={"accept": accept})
        plain = await client.get("/metrics", headers={"accept": "text/plain;version=0.0.4"})
    assert open_metrics.headers["content-type"].startswith("application/openmetrics-text")
    assert plain.headers["content-type"].startswith("text/plain")
    assert trace_id not in plain.text
    exemplars = {
        (family.name, sample.exemplar.labels["trace_id"])
        for family in open_metrics_families(open_metrics.text)  # type: ignore[no-untyped-call]
        for sample in family.samples
        if sample.exemplar
    }
    latencies = ("time_to_first_token", "time_per_output_token", "request_duration")
    expected = {(f"expertfleet_{name}_seconds", trace_id) for name in latencies}
    assert exemplars == (expected if ratio else set())


async def test_two_gateways_in_a_process_do_not_share_counters(model_folder: Path) -> None:
    shard = FakeShard(repeats([9]))
    async with client_of(shard, model_folder) as one, client_of(shard, model_folder) as two:
        await asyncio.gather(*(one.get("/healthz") for _ in range(3)))
        labels = frozenset({("route", "/healthz"), ("status", "200")})
        assert (await metrics_of(one))["expertfleet_requests_total", labels] == 3
        assert ("expertfleet_requests_total", labels) not in await metrics_of(two)


@pytest.mark.parametrize("registry_error", [RuntimeError("bug")])
async def test_a_bug_in_the_registry_is_a_500(
    model_folder: Path, registry_error: Exception
) -> None:
    registry = FixedRegistry(FleetSnapshot())
    registry.current = registry_error
    async with client_of(FakeShard(repeats([9])), model_folder, registry=registry) as client:
        response = await client.get("/v1/experts")
    assert (response.status_code, error_of(response)["code"]) == (500, "internal_error")
