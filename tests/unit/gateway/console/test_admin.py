from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from services.core.errors import UnavailableError, WorkerMemoryError
from services.core.registry import Slot
from services.core.settings import load_settings
from services.core.worker_control import SlotsHeld
from services.gateway.app import create_app
from tests.support.fake_shard import FakeShard, repeats
from tests.support.records import worker_record
from tests.unit.gateway.console.scene import FixedRegistry
from tests.unit.gateway.http import error_of

KEYED = {"authorization": "Bearer root"}
BOTH = [(0, 0), (0, 1)]


class FakeControl:
    """Workers that do as they are told, unless `error` is set."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str, list[Slot]]] = []
        self.carriers: list[Mapping[str, str]] = []
        self.error: Exception | None = None

    async def load(
        self, endpoint: str, slots: Iterable[Slot], carrier: Mapping[str, str]
    ) -> SlotsHeld:
        return self._tell("load", endpoint, slots, carrier, frozenset({*BOTH, (1, 1)}))

    async def unload(
        self, endpoint: str, slots: Iterable[Slot], carrier: Mapping[str, str]
    ) -> SlotsHeld:
        return self._tell("unload", endpoint, slots, carrier, frozenset({(0, 1)}))

    async def drain(self, endpoint: str) -> None:
        self._tell("drain", endpoint, (), {}, frozenset())

    def _tell(
        self,
        action: str,
        endpoint: str,
        slots: Iterable[Slot],
        carrier: Mapping[str, str],
        held: frozenset[Slot],
    ) -> SlotsHeld:
        if self.error is not None:
            raise self.error
        self.told.append((action, endpoint, list(slots)))
        self.carriers.append(carrier)
        return SlotsHeld(slots=held, memory_free_bytes=77)


def fleet() -> FixedRegistry:
    return FixedRegistry(
        worker_record("a", BOTH, endpoint="host-a:1"),
        worker_record("b", BOTH, endpoint="host-b:1", memory_free_bytes=0),
        worker_record("c", [(1, 1)], endpoint="host-c:1", slot_bytes=10),
    )


def client_of(
    model_folder: Path,
    control: FakeControl,
    *,
    registry: FixedRegistry | None = None,
    spans: InMemorySpanExporter | None = None,
    **settings: Any,
) -> httpx.AsyncClient:
    provider = TracerProvider()
    if spans is not None:
        provider.add_span_processor(SimpleSpanProcessor(spans))
    app = create_app(
        load_settings(model="org/tiny", **{"admin_key": "root"} | settings),
        FakeShard(repeats([9])),
        registry or fleet(),
        model_folder=model_folder,
        tracer=provider.get_tracer("test"),
        control=control,
    )
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://gateway", headers=KEYED
    )


async def test_without_an_admin_key_nobody_administers(model_folder: Path) -> None:
    control = FakeControl()
    for off in (None, ""):
        async with client_of(model_folder, control, admin_key=off) as client:
            refused = await client.post("/admin/workers/a/drain")
        assert (refused.status_code, error_of(refused)["code"]) == (403, "administration_off")
        assert "EXPERTFLEET_ADMIN_KEY" in error_of(refused)["message"]
    assert control.told == []


@pytest.mark.parametrize("given", ["", "root", "Bearer", "Bearer wrong", "Basic root"])
async def test_only_the_admin_key_opens_and_no_api_key_does(model_folder: Path, given: str) -> None:
    control = FakeControl()
    async with client_of(model_folder, control, api_keys="wrong") as client:
        headers = {"authorization": given}
        for path in ("/admin/workers/a/drain", "/admin/experts/0/0/replicas"):
            refused = await client.post(path, headers=headers, json={"replicas": 3})
            assert (refused.status_code, error_of(refused)["code"]) == (401, "invalid_api_key")
    assert control.told == []


async def test_a_worker_is_drained_and_what_nobody_else_holds_is_told(
    model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    control, spans = FakeControl(), InMemorySpanExporter()
    caplog.set_level(logging.INFO)
    async with client_of(model_folder, control, spans=spans) as client:
        one = await client.post("/admin/workers/a/drain")
        other = await client.post("/admin/workers/c/drain")
    assert one.json() == {"worker_id": "a", "state": "draining", "unserved": []}
    assert other.json()["unserved"] == [[1, 1]]
    assert control.told == [("drain", "host-a:1", []), ("drain", "host-c:1", [])]
    assert "administration: drain a: done" in caplog.text
    act = next(span for span in spans.get_finished_spans() if "administration" in span.name)
    assert act.attributes is not None
    assert act.attributes["expertfleet.worker_id"] == "a"
    assert act.parent is not None, "it belongs to the request's trace"


async def test_a_replica_is_loaded_where_there_is_memory_and_slots_held_are_told(
    model_folder: Path,
) -> None:
    control, spans = FakeControl(), InMemorySpanExporter()
    async with client_of(model_folder, control, spans=spans) as client:
        answer = await client.post("/admin/experts/0/0/replicas", json={"replicas": 3})
    assert control.told == [("load", "host-c:1", [(0, 0)])]
    told = answer.json()
    assert (told["layer"], told["expert"], told["replicas"]) == (0, 0, 3)
    assert [(each["worker_id"], each["action"]) for each in told["workers"]] == [
        ("a", None),
        ("b", None),
        ("c", "load"),
    ]
    loaded = told["workers"][2]
    assert (loaded["slots"], loaded["memory_free_bytes"]) == ([[0, 0], [0, 1], [1, 1]], 77)
    act = next(span for span in spans.get_finished_spans() if "administration" in span.name)
    assert act.context is not None
    assert f"{act.context.span_id:016x}" in control.carriers[0]["traceparent"]


async def test_replicas_are_given_up_but_never_the_last(model_folder: Path) -> None:
    control = FakeControl()
    async with client_of(model_folder, control) as client:
        answer = await client.post(
            "/admin/experts/0/0/replicas", json={"replicas": 1, "worker_id": "a"}
        )
        last = await client.post("/admin/experts/1/1/replicas", json={"replicas": 0})
    assert (answer.json()["replicas"], control.told) == (1, [("unload", "host-a:1", [(0, 0)])])
    assert (last.status_code, error_of(last)["param"]) == (400, "replicas")


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/admin/workers/nobody/drain", None, 404, "worker_id"),
        ("/admin/experts/2/0/replicas", {"replicas": 2}, 400, "layer"),
        ("/admin/experts/0/4/replicas", {"replicas": 2}, 400, "expert"),
        ("/admin/experts/-1/0/replicas", {"replicas": 2}, 400, "layer"),
        ("/admin/experts/0/zero/replicas", {"replicas": 2}, 400, "expert"),
        ("/admin/experts/0/0/replicas", {}, 400, "replicas"),
        ("/admin/experts/0/0/replicas", {"replicas": "2"}, 400, "replicas"),
        ("/admin/experts/0/0/replicas", {"replicas": 2, "force": True}, 400, "force"),
        ("/admin/experts/0/0/replicas", {"replicas": 3, "worker_id": "x"}, 404, "worker_id"),
    ],
)
async def test_mistakes_are_named(
    model_folder: Path, path: str, body: Any, status: int, param: str
) -> None:
    control = FakeControl()
    async with client_of(model_folder, control) as client:
        refused = await client.post(path, json=body)
    assert (refused.status_code, error_of(refused)["param"]) == (status, param)
    assert control.told == []


async def test_what_a_worker_refuses_is_told_and_logged(
    model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    control = FakeControl()
    async with client_of(model_folder, control) as client:
        for error, status in ((WorkerMemoryError("full"), 507), (UnavailableError("gone"), 503)):
            control.error = error
            refused = await client.post("/admin/experts/0/0/replicas", json={"replicas": 3})
            assert (refused.status_code, error_of(refused)["message"]) == (status, str(error))
    assert "refused: full" in caplog.text


async def test_two_acts_at_once_do_not_take_the_last_two_replicas(model_folder: Path) -> None:
    registry, control = fleet(), FakeControl()
    unload = control.unload

    async def unload_and_announce(
        endpoint: str, slots: Iterable[Slot], carrier: Mapping[str, str]
    ) -> SlotsHeld:
        held = await unload(endpoint, slots, carrier)
        await asyncio.sleep(0)
        name = endpoint[len("host-")]
        kept = [worker for worker in registry.current.workers if worker.worker_id != name]
        registry.set([*kept, worker_record(name, held.slots)])
        return held

    control.unload = unload_and_announce  # type: ignore[method-assign]
    async with client_of(model_folder, control, registry=registry) as client:
        answers = await asyncio.gather(
            *(
                client.post(
                    "/admin/experts/0/0/replicas", json={"replicas": 1, "worker_id": worker_id}
                )
                for worker_id in ("a", "b")
            )
        )
    assert [action for action, _, _ in control.told] == ["unload"]
    assert [answer.json()["replicas"] for answer in answers] == [1, 1]
