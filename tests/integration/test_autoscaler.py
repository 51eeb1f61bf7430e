"""The autoscaler with real workers, a real store and real load."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from pathlib import Path

import torch
from redis.asyncio import Redis

from router_service.dispatch.dispatcher import RemoteExperts
from router_service.experts import StepContext
from services.autoscaler.leader import RedisLeader
from services.autoscaler.options import PolicyOptions
from services.autoscaler.run import run_autoscaler
from services.core.model_config import load_model_config
from services.core.redis_registry import RedisRegistry
from services.core.registry import Slot
from services.core.settings import Settings
from tests.support.eventually import eventually
from tests.support.redis_server import running_redis
from tests.support.worker_process import REPOSITORY, running_worker

DEMO = REPOSITORY / "models" / "demo"
HOT_SHARE = 0.7
NUM_TOKENS = 512


async def test_a_hot_slot_gets_a_replica_on_a_real_worker_and_loses_it_after_the_load(
    tmp_path: Path,
) -> None:
    config = load_model_config(DEMO)
    hot = {(layer, 0) for layer in range(config.num_hidden_layers)}
    options = PolicyOptions(
        shadow_copies=False, min_utilization=0.02, hot_after_s=0.4, idle_after_s=1, cool_down_s=1
    )
    with contextlib.ExitStack() as cleanup:
        store = cleanup.enter_context(running_redis(tmp_path, unix_socket=True))
        environment = {"EXPERTFLEET_REDIS_URL": store.url, "EXPERTFLEET_HEARTBEAT_S": "0.2"}
        for name, held in (("a", "0-3"), ("b", "4-7")):
            cleanup.enter_context(
                running_worker(DEMO, held, "--worker-id", name, environment=environment)
            )
        registry = RedisRegistry(store.url, fleet="default", timeout_s=60.0)

        async def slots_of(worker_id: str) -> frozenset[Slot]:
            workers = {w.worker_id: w.slots for w in (await registry.snapshot()).workers}
            return workers[worker_id]

        async def has_replicas() -> bool:
            return hot <= await slots_of("b")

        async def is_as_before() -> bool:
            return (await slots_of("a"), await slots_of("b")) == slots_before

        slots_before = await slots_of("a"), await slots_of("b")
        async with (
            _running(Settings(redis_url=store.url), registry, options),
            _dispatcher(store.url) as experts,
        ):
            assert not await has_replicas()
            load = asyncio.create_task(_endless_load(experts, hot_share=HOT_SHARE))
            await eventually(has_replicas, timeout_s=120)  # `make bench-hot-expert` looks for 5 s
            load.cancel()
            await asyncio.gather(load, return_exceptions=True)
            assert load.cancelled()  # and no call of it has failed
            await eventually(is_as_before, timeout_s=120)
        await registry.close()


async def test_of_two_autoscalers_one_leads_and_the_other_takes_over(tmp_path: Path) -> None:
    with running_redis(tmp_path, unix_socket=True) as store:
        first = RedisLeader(store.url, fleet="f", ttl_s=60, timeout_s=30)
        second = RedisLeader(store.url, fleet="f", ttl_s=60, timeout_s=30)
        elsewhere = RedisLeader(store.url, fleet="g", ttl_s=60, timeout_s=30)
        assert await first.holds() and await first.holds()
        assert not await second.holds()
        assert await elsewhere.holds()
        async with Redis.from_url(store.url) as client:
            (key,) = [key async for key in client.scan_iter("*:f:*")]
            assert 0 < await client.pttl(key) <= 60_000
            await client.pexpire(key, 1)  # the first one stopped renewing a minute ago
        await eventually(second.holds)
        assert not await first.holds()
        await second.release()
        assert await first.holds()
        await first.release()
        await elsewhere.release()


async def test_with_the_store_away_nobody_leads(tmp_path: Path) -> None:
    leader = RedisLeader(f"unix://{tmp_path}/none.sock", fleet="f")
    assert not await leader.holds()
    await leader.release()


@contextlib.asynccontextmanager
async def _dispatcher(store_url: str) -> AsyncIterator[RemoteExperts]:
    experts = RemoteExperts(
        load_model_config(DEMO),
        registry=RedisRegistry(store_url, fleet="default"),
        dtype=torch.bfloat16,
    )
    try:
        await experts.wait_ready()
        yield experts
    finally:
        await experts.close()


async def _endless_load(experts: RemoteExperts, *, hot_share: float) -> None:
    """Dispatch rows to every layer in turn, `hot_share` of them to expert 0, the others evenly."""
    config = load_model_config(DEMO)
    num_hot = round(NUM_TOKENS * hot_share)
    others = torch.arange(NUM_TOKENS - num_hot) % (config.num_local_experts - 1) + 1
    ids = torch.cat([torch.zeros(num_hot, dtype=torch.int64), others])[:, None]
    weights = torch.ones(NUM_TOKENS, 1)
    rows = torch.randn(NUM_TOKENS, config.hidden_size).bfloat16()
    for step in itertools.count():
        for layer in range(config.num_hidden_layers):
            await experts.forward(layer, rows, ids, weights, StepContext(step=step))


@contextlib.asynccontextmanager
async def _running(
    settings: Settings, registry: RedisRegistry, options: PolicyOptions
) -> AsyncIterator[None]:
    task = asyncio.create_task(
        run_autoscaler(settings, registry, options, scaler=None, interval_s=0.2)
    )
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
