from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from services.core.errors import UnavailableError
from services.core.redis_registry import RedisRegistry
from services.core.store_server import StoreServer, start_server
from tests.support.eventually import eventually
from tests.support.records import shard_record, worker_record
from tests.support.redis_server import running_redis


def patient_registry(url: str, fleet: str) -> RedisRegistry:
    """Of a server that answers, however busy the machine."""
    return RedisRegistry(url, fleet=fleet, timeout_s=60.0)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    with running_redis(tmp_path_factory.mktemp("store")) as started:
        yield started


async def test_what_one_process_publishes_another_reads(server: StoreServer) -> None:
    writer = patient_registry(server.url, "read")
    reader = patient_registry(server.url, "read")
    worker = worker_record("w", {(0, 0), (1, 0)}, tokens={(0, 0): 3})
    shard = shard_record("s", expert_load={(1, 0): 9})
    await writer.publish(worker, 60.0)
    await writer.publish(shard, 60.0)
    snapshot = await reader.snapshot()
    assert snapshot.workers == (worker,)
    assert snapshot.shards == (shard,)
    await writer.remove("w")
    assert (await reader.snapshot()).workers == ()
    await writer.close()
    await reader.close()


async def test_fleets_do_not_see_each_other(server: StoreServer) -> None:
    one, other = patient_registry(server.url, "one"), patient_registry(server.url, "other")
    await one.publish(worker_record("w"), 60.0)
    assert (await other.snapshot()).workers == ()
    await one.close()
    await other.close()


async def test_an_index_overwritten_with_something_else_is_made_anew(server: StoreServer) -> None:
    registry = patient_registry(server.url, "spoilt")
    await registry.publish(worker_record("w"), 60.0)
    async with Redis.from_url(server.url) as client:
        await client.set("expertfleet:spoilt:leases", b"\xff garbage")
    with pytest.raises(UnavailableError):
        await registry.snapshot()
    await registry.publish(worker_record("w"), 60.0)
    assert [worker.worker_id for worker in (await registry.snapshot()).workers] == ["w"]
    await registry.close()


async def test_a_lease_that_is_not_renewed_is_gone_and_leaves_no_trace(server: StoreServer) -> None:
    registry = patient_registry(server.url, "lease")
    await registry.publish(worker_record("w"), 0.1)
    async with asyncio.timeout(60):
        while (await registry.snapshot()).workers:
            pass
    async with Redis.from_url(server.url) as client:
        assert await client.keys("expertfleet:lease:lease:*") == []
        assert await client.smembers("expertfleet:lease:leases") == set()
    await registry.close()


async def test_garbage_in_the_store_is_skipped_and_logged_once(
    server: StoreServer, caplog: pytest.LogCaptureFixture
) -> None:
    registry = patient_registry(server.url, "garbage")
    await registry.publish(worker_record("good"), 60.0)
    async with Redis.from_url(server.url) as client:
        await client.set("expertfleet:garbage:lease:bad", b"\x00nonsense")
        await client.sadd("expertfleet:garbage:leases", "bad")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            snapshot = await registry.snapshot()
    assert [worker.worker_id for worker in snapshot.workers] == ["good"]
    assert sum("nonsense" in record.getMessage() for record in caplog.records) == 1
    await registry.close()


async def test_keys_of_another_type_are_reported_as_unavailable(server: StoreServer) -> None:
    registry = patient_registry(server.url, "foreign")
    async with Redis.from_url(server.url) as client:
        await client.set("expertfleet:foreign:leases", "not a set")
    with pytest.raises(UnavailableError, match="REDIS_URL"):
        await registry.snapshot()
    await registry.close()


async def test_a_registry_goes_on_after_the_server_was_restarted(tmp_path: Path) -> None:
    first = start_server(tmp_path, port=0)
    registry = patient_registry(first.url, "again")
    await registry.publish(worker_record("w"), 60.0)
    first.stop()
    with pytest.raises(UnavailableError, match="REDIS_URL"):
        await registry.snapshot()
    second = start_server(tmp_path, port=first.port)
    try:
        await registry.publish(worker_record("w"), 60.0)
        assert len((await registry.snapshot()).workers) == 1
    finally:
        await registry.close()
        second.stop()


async def test_a_store_that_hangs_does_not_hang_the_caller(tmp_path: Path) -> None:
    with running_redis(tmp_path) as server:
        patient = patient_registry(server.url, "hang")
        await patient.publish(worker_record("w"), 60.0)
        registry = RedisRegistry(server.url, fleet="hang", timeout_s=0.3)
        server.process.send_signal(signal.SIGSTOP)
        try:
            async with asyncio.timeout(60):
                with pytest.raises(UnavailableError):
                    await registry.publish(worker_record("w"), 60.0)
                with pytest.raises(UnavailableError):
                    await registry.snapshot()
        finally:
            server.process.send_signal(signal.SIGCONT)

        async def is_answering() -> bool:
            try:
                return len((await registry.snapshot()).workers) == 1
            except UnavailableError:
                return False

        await eventually(is_answering)
        await patient.close()
        await registry.close()


async def test_a_server_on_a_unix_socket_listens_on_no_port(tmp_path: Path) -> None:
    with running_redis(tmp_path, unix_socket=True) as server:
        assert server.url.startswith("unix://")
        registry = patient_registry(server.url, "socket")
        await registry.publish(worker_record("w"), 60.0)
        assert len((await registry.snapshot()).workers) == 1
        await registry.close()
        async with Redis.from_url(server.url) as client:
            assert (await client.config_get("port"))["port"] == "0"
            assert (await client.config_get("maxmemory-policy"))[
                "maxmemory-policy"
            ] == "allkeys-lru"
    assert server.process.poll() is not None
    assert not (tmp_path / "store.sock").exists()


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with (
        running_redis(tmp_path / "first") as server,
        pytest.raises(UnavailableError, match="in use"),
    ):
        start_server(tmp_path / "second", port=server.port)


async def test_a_task_that_reads_on_and_on_ends_whenever_it_is_cancelled(
    server: StoreServer,
) -> None:
    """Also as a command has just been sent: shards and launchers wait for the end of such tasks."""
    registry = patient_registry(server.url, "cancelled")
    await registry.publish(worker_record("w"), 60.0)

    async def read_on() -> None:
        while True:
            await registry.snapshot()

    for turns in range(60):
        task = asyncio.create_task(read_on())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task}, timeout=2.0)
        has_ended = task.done()
        while not task.done():
            task.cancel()
            await asyncio.sleep(0)
        assert has_ended, f"went on after being cancelled at turn {turns}"
    await registry.close()
