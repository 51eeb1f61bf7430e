from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from typer.testing import CliRunner

from services.cli.main import app
from services.core.errors import ConfigurationError
from services.core.redis_registry import RedisRegistry
from tests.support.records import worker_record
from tests.support.redis_server import running_redis

GROUP = "expertfleet-experts-0=0-3"


@pytest.fixture
def store_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store without a server: nothing listens there."""
    url = f"unix://{tmp_path}/none.sock"
    monkeypatch.setenv("EXPERTFLEET_REDIS_URL", url)
    return url


def test_a_dry_run_says_what_it_would_do_and_why_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_redis(tmp_path, unix_socket=True) as store:
        monkeypatch.setenv("EXPERTFLEET_REDIS_URL", store.url)
        workers = [
            worker_record(
                worker_id=name,
                slots=frozenset({(0, index)}),
                slot_bytes=10,
                memory_free_bytes=100,
            )
            for index, name in enumerate(("first", "second"))
        ]
        asyncio.run(_publish(store.url, workers))
        before = asyncio.run(_slots(store.url))
        # Shadow copies are asked for once a slot has been exposed for 5 s.
        result = CliRunner().invoke(
            app,
            ["autoscale", "--dry-run", "--once", "--watch-s", "6", "--interval-s", "0.5"],
            env={"COLUMNS": "200"},
        )
        assert result.exit_code == 0, result.output
        assert "load 0:1 on first" in result.output
        assert "load 0:0 on second" in result.output
        assert "is held by second alone" in result.output
        assert asyncio.run(_slots(store.url)) == before


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--mode", "kubernetes"], "--group DEPLOYMENT=EXPERTS for each"),
        (["--mode", "kubernetes", "--group", "no"], "--group 'no' cannot be read"),
        (["--mode", "kubernetes", "--group", GROUP + ":3-2"], "replicas 3-2"),
        (["--cool-ratio", "1.5"], "hot_ratio=1.3 must be above cool_ratio"),
        (["--min-workers", "3", "--max-workers", "2"], "min_workers=3 must be 1 to max_workers"),
    ],
)
@pytest.mark.usefixtures("store_url")
def test_arguments_that_make_no_sense_are_refused(arguments: list[str], told: str) -> None:
    result = CliRunner().invoke(app, ["autoscale", "--dry-run", "--once", *arguments])
    assert isinstance(result.exception, ConfigurationError)
    assert told in result.exception.message


@pytest.mark.usefixtures("store_url")
def test_an_unknown_mode_is_a_usage_error() -> None:
    assert CliRunner().invoke(app, ["autoscale", "--mode", "nomad"]).exit_code == 2


def test_without_a_store_the_running_product_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EXPERTFLEET_REDIS_URL", raising=False)
    monkeypatch.delenv("REDIS_URL", raising=False)
    result = CliRunner().invoke(app, ["autoscale", "--dry-run", "--state-dir", str(tmp_path)])
    assert isinstance(result.exception, ConfigurationError)
    assert "no `expertfleet up` runs" in result.exception.message


async def _publish(url: str, records: list) -> None:  # type: ignore[type-arg]
    registry = RedisRegistry(url, fleet="default", timeout_s=60.0)
    for record in records:
        await registry.publish(record, lease_s=60)
    await registry.close()


async def _slots(url: str) -> dict[str, object]:
    registry = RedisRegistry(url, fleet="default", timeout_s=60.0)
    snapshot = await registry.snapshot()
    await registry.close()
    return {worker.worker_id: worker.slots for worker in snapshot.workers}
