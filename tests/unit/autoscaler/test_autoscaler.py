from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry

from services.autoscaler.autoscaler import FIRST_BACK_OFF_S, Autoscaler
from services.autoscaler.leader import SoleLeader
from services.autoscaler.metrics import AutoscalerMetrics
from services.autoscaler.options import PolicyOptions
from services.core import telemetry
from services.core.errors import ExpertfleetError, UnavailableError
from services.core.memory_registry import MemoryRegistry
from services.core.registry import FleetSnapshot, Slot
from tests.support.eventually import eventually
from tests.support.records import worker_record

MIB = 1 << 20


class FakeControl:
    """Answers like workers that hold what they are told; `error` is raised instead."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, tuple[Slot, ...]]] = []
        self.carriers: list[Mapping[str, str]] = []
        self.error: ExpertfleetError | None = None

    async def load(self, endpoint: str, slots: Sequence[Slot], carrier: Mapping[str, str]) -> None:
        await self._call("load", endpoint, slots, carrier)

    async def unload(
        self, endpoint: str, slots: Sequence[Slot], carrier: Mapping[str, str]
    ) -> None:
        await self._call("unload", endpoint, slots, carrier)

    async def _call(
        self, what: str, endpoint: str, slots: Sequence[Slot], carrier: Mapping[str, str]
    ) -> None:
        self.calls.append((what, endpoint, tuple(slots)))
        self.carriers.append(carrier)
        if self.error is not None:
            raise self.error


class Standby:
    async def holds(self) -> bool:
        return False

    async def release(self) -> None: ...


class Scene:
    """Two workers with one slot each and memory for another: shadow copies are due at once."""

    def __init__(self, *, is_leader: bool = True) -> None:
        self.now = 100.0
        self.registry = MemoryRegistry(clock=lambda: 0.0)
        self.control = FakeControl()
        self.collectors = CollectorRegistry()
        self.spans = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.spans))
        self.autoscaler = Autoscaler(
            self.registry,
            PolicyOptions(protect_after_s=0.0),
            slot_control=self.control,
            scaler=None,
            leadership=SoleLeader() if is_leader else Standby(),
            tracer=provider.get_tracer("test"),
            metrics=AutoscalerMetrics(self.collectors),
            clock=lambda: self.now,
        )

    async def publish(self) -> None:
        for index in range(2):
            record = worker_record(
                f"w{index}",
                {(0, index)},
                endpoint=f"host:{index}",
                slot_bytes=MIB,
                memory_free_bytes=MIB,
                host=f"host-{index}",
            )
            await self.registry.publish(record, 5.0)

    async def settle(self) -> None:
        await eventually(lambda: not self.autoscaler.is_acting)


async def test_what_is_decided_is_done_traced_counted_and_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    scene = Scene()
    await scene.publish()
    planned = await scene.autoscaler.round()
    await scene.settle()
    assert sorted(scene.control.calls) == [
        ("load", "host:0", ((0, 1),)),
        ("load", "host:1", ((0, 0),)),
    ]
    spans = scene.spans.get_finished_spans()
    assert {span.name for span in spans} == {telemetry.SPAN_AUTOSCALER_DECISION}
    reasons = {(span.attributes or {})[telemetry.ATTR_AUTOSCALER_REASON] for span in spans}
    assert reasons == {one.reason for one in planned}
    assert all("traceparent" in carrier for carrier in scene.control.carriers)
    assert _actions(scene, "protect", "done") == 2
    assert "protect: load 0:1 on w0, because layer 0 expert 1 is held by w1 alone" in caplog.text
    assert scene.collectors.get_sample_value(telemetry.METRIC_UNPROTECTED_SLOTS) == 2


async def test_a_failure_is_told_and_its_worker_left_alone_longer_each_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    scene = Scene()
    await scene.publish()
    scene.control.error = UnavailableError("worker host:0: no route")
    for waited_s in (FIRST_BACK_OFF_S, 2 * FIRST_BACK_OFF_S):
        scene.control.calls.clear()
        await scene.autoscaler.round()
        await scene.settle()
        assert len(scene.control.calls) == 2
        scene.now += waited_s - 0.1
        assert await scene.autoscaler.round() == ()
        scene.now += 0.2
    assert _actions(scene, "protect", "failed") == 4
    assert "no route; w0 is left alone for 10 s" in caplog.text
    assert all(not span.status.is_ok for span in scene.spans.get_finished_spans())


async def test_without_the_lead_nothing_is_done() -> None:
    scene = Scene(is_leader=False)
    await scene.publish()
    assert await scene.autoscaler.round() == ()
    assert scene.control.calls == []
    assert scene.collectors.get_sample_value(telemetry.METRIC_AUTOSCALER_LEADER) == 0


async def test_with_the_store_away_nothing_is_decided(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scene = Scene()
    await scene.publish()

    async def away() -> FleetSnapshot:
        raise UnavailableError("no store")

    with monkeypatch.context() as patch:
        patch.setattr(scene.registry, "snapshot", away)
        assert await scene.autoscaler.round() == ()
        assert await scene.autoscaler.round() == ()
    assert caplog.text.count("nothing is decided: no store") == 1
    assert len(await scene.autoscaler.round()) == 2
    await scene.settle()


def _actions(scene: Scene, purpose: str, outcome: str) -> float | None:
    labels = {"purpose": purpose, "outcome": outcome}
    return scene.collectors.get_sample_value(telemetry.METRIC_AUTOSCALER_ACTIONS, labels)
