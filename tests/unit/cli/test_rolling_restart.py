from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from services.cli.rolling_restart import RollingRestart, next_fleet, parse_what
from services.cli.startup import fits_beside
from services.core.errors import InvalidRequestError, UnavailableError
from services.core.registry import Slot, WorkerRecord
from services.core.settings import Settings
from tests.support.product import DEMO_MODEL

MIB = 1 << 20


@dataclass
class FakeFleet:
    """Stands in for the workers and the front; `log` is what was asked of them, in order."""

    settings: Settings
    held: dict[str, frozenset[Slot]]
    is_one_process: bool = False
    fails: bool = False
    weight_bytes: int = MIB
    log: list[str] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=lambda: iter(range(10, 99)))

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(self.held)

    async def ready(self) -> dict[str, WorkerRecord]:
        return {name: _record(name, slots, self.weight_bytes) for name, slots in self.held.items()}

    async def start(self, placement: list[frozenset[Slot]]) -> list[str]:
        names = [f"expert-{next(self._numbers)}" for _ in placement]
        self.held |= dict(zip(names, placement, strict=True))
        self.log.append(f"start {len(names)} in {self.settings.fleet}")
        return names

    async def renew(self, worker_id: str) -> str:
        self.log.append(f"renew {worker_id}")
        return worker_id

    async def remove(self, worker_id: str) -> None:
        del self.held[worker_id]
        self.log.append(f"remove {worker_id}")

    async def restart_shards(self, settings: Settings) -> None:
        self.log.append(f"shards of {settings.fleet}")

    async def restart_gateway(self, settings: Settings) -> None:
        self.log.append(f"gateway of {settings.fleet}")

    async def replace(self, settings: Settings) -> None:
        self.log.append(f"replace by {settings.fleet} as {settings.served_model_name}")
        if self.fails:
            raise UnavailableError("the new shards did not start")


def _record(name: str, slots: frozenset[Slot], weight_bytes: int) -> WorkerRecord:
    return WorkerRecord(
        worker_id=name,
        endpoint="127.0.0.1:1",
        state="ready",
        slots=slots,
        device="cpu",
        pid=1,
        host="here",
        started_at=0.0,
        weight_bytes=weight_bytes,
        memory_free_bytes=0,
    )


def _fleet(**changes: Any) -> FakeFleet:
    held = {"expert-0": frozenset({(0, 0)}), "expert-1": frozenset({(0, 1)})}
    return FakeFleet(settings=Settings(model=str(DEMO_MODEL)), held=held, **changes)


def _restart(fleet: FakeFleet) -> RollingRestart:
    return RollingRestart(fleet, fleet, lambda _: None)  # type: ignore[arg-type]


async def test_workers_come_one_by_one_then_shards_then_the_gateway() -> None:
    fleet = _fleet()
    await _restart(fleet).renew("all", fleet.settings)
    assert fleet.log == [
        "renew expert-0",
        "renew expert-1",
        "shards of default",
        "gateway of default",
    ]


async def test_gateway_and_shard_in_one_process_restart_once() -> None:
    fleet = _fleet(is_one_process=True)
    await _restart(fleet).renew("all", fleet.settings)
    assert fleet.log[2:] == ["shards of default"]


async def test_only_what_was_named_is_restarted() -> None:
    fleet = _fleet()
    await _restart(fleet).renew("gateway", fleet.settings)
    assert fleet.log == ["gateway of default"]


async def test_another_models_processes_come_up_first_in_a_namespace_of_their_own() -> None:
    fleet = _fleet()
    before = dict(fleet.held)
    changed = await _restart(fleet).change_model(str(DEMO_MODEL), fleet.settings)
    assert fleet.log == [
        "start 2 in default-2",
        "replace by default-2 as demo",
        "remove expert-0",
        "remove expert-1",
    ]
    assert sorted(map(sorted, fleet.held.values())) == sorted(map(sorted, before.values()))
    assert changed.fleet == fleet.settings.fleet == "default-2"


async def test_a_model_that_does_not_start_leaves_the_old_one_as_it_was() -> None:
    fleet = _fleet(fails=True)
    settings, held = fleet.settings, dict(fleet.held)
    with pytest.raises(UnavailableError, match="did not start"):
        await _restart(fleet).change_model(str(DEMO_MODEL), settings)
    assert fleet.held == held
    assert fleet.settings == settings


async def test_a_model_without_memory_beside_the_old_one_is_refused_before_anything() -> None:
    fleet = _fleet(weight_bytes=1 << 50)
    with pytest.raises(UnavailableError, match="MiB are free"):
        await _restart(fleet).change_model(str(DEMO_MODEL), fleet.settings)
    assert fleet.log == []


def test_each_model_gets_the_next_namespace() -> None:
    assert next_fleet("default") == "default-2"
    assert next_fleet("default-2") == "default-3"
    assert next_fleet("blue-9") == "blue-10"


def test_what_can_be_restarted_is_named() -> None:
    assert parse_what("shards") == "shards"
    with pytest.raises(InvalidRequestError, match="workers, shards, gateway, all"):
        parse_what("store")


def test_a_second_process_needs_its_weights_and_room_to_work() -> None:
    assert fits_beside(1000 * MIB, 1500 * MIB)
    assert not fits_beside(1000 * MIB, 1400 * MIB)
    assert not fits_beside(0, 100 * MIB)
