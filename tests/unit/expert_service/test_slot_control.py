from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
import torch
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import NoOpTracer
from prometheus_client import CollectorRegistry

from expert_service.dispatch import DispatchService
from expert_service.expert_loader import ExpertLoader
from expert_service.frame_spans import FrameSpans
from expert_service.held_experts import HeldExperts, LoadingCancelledError
from expert_service.slot_control import SlotControl
from expert_service.worker_stats import WorkerStats
from services.core.errors import WorkerRefusedError
from services.core.registry import Slot
from services.core.settings import Settings
from services.core.telemetry import ATTR_ERROR, ATTR_SLOTS, SPAN_LOAD_SLOTS, SPAN_UNLOAD_SLOTS
from tests.support.checkpoints import make_checkpoint
from tests.support.eventually import eventually

AT_START = ((0, 1), (1, 1))
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


class StallingLoader(ExpertLoader):
    """Loads what is asked for once `go` is set; notices being cancelled as the real one does."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.go = threading.Event()
        self.go.set()
        self.num_running = 0

    def load(self, slots: Sequence[Slot], cancelled: threading.Event) -> HeldExperts:
        self.num_running += 1
        try:
            while not self.go.wait(0.005):
                if cancelled.is_set():
                    raise LoadingCancelledError
            return super().load(slots, cancelled)
        finally:
            self.num_running -= 1


class Bench:
    """A `SlotControl` without a worker around it."""

    def __init__(self, model: Path) -> None:
        settings = Settings(model=str(model))
        self.loader = StallingLoader(settings)
        self.spans = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.spans))
        self.announced: list[frozenset[Slot]] = []
        stats = WorkerStats(CollectorRegistry())
        self.dispatch = DispatchService(
            max_frame_bytes=settings.max_frame_bytes,
            stats=stats,
            spans=FrameSpans(NoOpTracer(), worker_id="w"),
        )
        self.control = SlotControl(
            worker_id="w",
            dispatch=self.dispatch,
            stats=stats,
            tracer=provider.get_tracer("test"),
            announce=self._announce,
        )

    async def start(self) -> None:
        await self.control.start(
            lambda: self.loader, lambda _: AT_START, num_threads=1, limit_bytes=None
        )

    @property
    def held(self) -> frozenset[Slot]:
        assert self.control.experts is not None
        return frozenset(self.control.experts.digests)

    async def _announce(self) -> None:
        self.announced.append(self.held)


@pytest.fixture
async def bench(model: Path) -> AsyncIterator[Bench]:
    threads = torch.get_num_threads()
    bench = Bench(model)
    await bench.start()
    yield bench
    bench.loader.go.set()
    bench.dispatch.close()
    torch.set_num_threads(threads)


async def test_changes_are_announced_and_each_is_a_span_under_its_callers(bench: Bench) -> None:
    carrier = {"traceparent": TRACEPARENT}
    await bench.control.load({(0, 1), (0, 2), (1, 2)}, carrier=carrier)
    await bench.control.unload({(0, 1)}, carrier=carrier)
    with pytest.raises(WorkerRefusedError):
        await bench.control.unload(bench.held)
    assert bench.announced == [
        frozenset({(0, 1), (1, 1), (0, 2), (1, 2)}),
        frozenset({(1, 1), (0, 2), (1, 2)}),
    ]
    load, unload, refused = bench.spans.get_finished_spans()
    assert [load.name, unload.name] == [SPAN_LOAD_SLOTS, SPAN_UNLOAD_SLOTS]
    assert load.attributes is not None and unload.attributes is not None
    assert load.attributes[ATTR_SLOTS] == "0-1:2"  # (0, 1) was held already
    assert unload.attributes[ATTR_SLOTS] == "0:1"
    assert load.parent is not None and unload.parent is not None
    assert f"{load.parent.span_id:016x}" == TRACEPARENT.split("-")[2]
    assert refused.attributes is not None
    assert "all that this worker holds" in str(refused.attributes[ATTR_ERROR])


async def test_one_load_runs_at_a_time_and_slots_may_go_meanwhile(bench: Bench) -> None:
    bench.loader.go.clear()
    loading = asyncio.create_task(bench.control.load({(0, 3)}))
    await eventually(lambda: bench.loader.num_running == 1)
    with pytest.raises(WorkerRefusedError, match="loading other slots"):
        await bench.control.load({(1, 3)})
    await bench.control.load({(1, 1)})  # held already: nothing to do
    await bench.control.unload({(0, 1)})
    assert bench.held == {(1, 1)}
    bench.loader.go.set()
    await loading
    assert bench.held == {(1, 1), (0, 3)}


async def test_stopping_gives_a_load_up_at_once_and_refuses_further_changes(bench: Bench) -> None:
    bench.loader.go.clear()
    loading = asyncio.create_task(bench.control.load({(0, 3)}))
    await eventually(lambda: bench.loader.num_running == 1)
    bench.control.stop()
    with pytest.raises(WorkerRefusedError, match="draining"):
        await loading
    await eventually(lambda: bench.loader.num_running == 0)
    with pytest.raises(WorkerRefusedError, match="draining"):
        await bench.control.unload({(0, 1)})
    assert bench.held == set(AT_START)
    assert bench.announced == []


async def test_a_caller_that_leaves_gives_its_load_up(bench: Bench) -> None:
    bench.loader.go.clear()
    loading = asyncio.create_task(bench.control.load({(0, 3)}))
    await eventually(lambda: bench.loader.num_running == 1)
    loading.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await loading
    await eventually(lambda: bench.loader.num_running == 0)
    bench.loader.go.set()
    await eventually(lambda: not bench.control.is_loading)
    await bench.control.load({(0, 2)})
    assert bench.held == {*AT_START, (0, 2)}


async def test_before_the_start_is_done_nothing_can_be_changed(model: Path) -> None:
    bench = Bench(model)
    bench.loader.go.clear()
    starting = asyncio.create_task(bench.start())
    await eventually(lambda: bench.loader.num_running == 1)
    with pytest.raises(WorkerRefusedError, match="still loading"):
        await bench.control.load({(0, 3)})
    bench.control.stop()
    with pytest.raises(LoadingCancelledError):
        await starting


async def test_the_bytes_foreseen_are_those_that_slots_then_take(bench: Bench) -> None:
    assert bench.control.experts is not None
    foreseen = bench.loader.weight_bytes(AT_START)
    assert foreseen == bench.control.experts.weight_bytes > 0
    for expert_weights in ("int8", "int4"):
        settings = Settings(model=bench.loader.checkpoint.folder.as_posix()).override(
            expert_weights=expert_weights
        )
        loader = ExpertLoader(settings)
        held = loader.load(AT_START, threading.Event())
        assert loader.weight_bytes(AT_START) == held.weight_bytes < foreseen
