"""Watches a running product's leases, and loads it with streams of generated tokens."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import psutil

from benchmarks.machine import busy_seconds
from services.cli.load.client import LoadClient, RequestRecord
from services.core.errors import UnavailableError
from services.core.redis_registry import RedisRegistry
from services.core.registry import FleetSnapshot

POLL_S = 0.1


@dataclass(slots=True, kw_only=True)
class FleetWatch:
    """Snapshots, and the cores' busy seconds, as they were seen, by `time.perf_counter`."""

    registry: RedisRegistry
    seen: list[tuple[float, FleetSnapshot]] = field(default_factory=list)
    busy: list[tuple[float, float]] = field(default_factory=list)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                self.seen.append((time.perf_counter(), await self.registry.snapshot()))
                self.busy.append((time.perf_counter(), busy_seconds()))
            except UnavailableError:
                return
            await asyncio.sleep(POLL_S)

    def worker_seconds(self, begin: float, end: float) -> float:
        """Seconds between, summed over the workers that had a lease then."""
        times = [at for at, _ in self.seen] + [end]
        return sum(
            max(0.0, min(until, end) - max(at, begin)) * len(snapshot.workers)
            for (at, snapshot), until in zip(self.seen, times[1:], strict=True)
        )

    def busy_share(self, begin: float, end: float) -> float:
        """Of the machine's cores between, by whatever; 0 to 1."""
        within = [(at, seconds) for at, seconds in self.busy if begin <= at < end]
        (first_at, first), (last_at, last) = within[0], within[-1]
        return (last - first) / ((last_at - first_at) * (psutil.cpu_count() or 1))

    def num_workers(self, begin: float, end: float) -> tuple[int, int]:
        """Fewest and most workers between."""
        counts = [len(snapshot.workers) for at, snapshot in self.seen if begin <= at < end]
        return min(counts), max(counts)


@dataclass(slots=True, kw_only=True)
class StreamLoad:
    """Requests, greedy, with random prompts of given tokens; `records` has every one sent. A second
    load with the same `seed` has the same prompts, which the product may have cached."""

    url: str
    prompt_tokens: int
    max_tokens: int
    seed: int = 0
    records: list[RequestRecord] = field(default_factory=list)
    _random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    async def streams(self, vocabularies: Sequence[range], seconds: float) -> None:
        """One client for each vocabulary, asking again and again; those under way are awaited."""
        end = time.perf_counter() + seconds

        async def stream(client: LoadClient, vocabulary: range) -> None:
            while time.perf_counter() < end:
                await self._ask(client, vocabulary)

        await self._with_client(
            lambda client: asyncio.gather(*(stream(client, each) for each in vocabularies))
        )

    async def arrivals(
        self, vocabulary: range, rate: Callable[[float], float], seconds: float
    ) -> None:
        """Requests at `rate(t)` per second, evenly spaced, whether or not earlier ones are done."""

        async def send(client: LoadClient) -> None:
            started = time.perf_counter()
            due = 0.0
            async with asyncio.TaskGroup() as tasks:
                while due < seconds:
                    await asyncio.sleep(max(0.0, started + due - time.perf_counter()))
                    tasks.create_task(self._ask(client, vocabulary))
                    due += 1 / rate(due)

        await self._with_client(send)

    async def _with_client(self, work: Callable[[LoadClient], Awaitable[object]]) -> None:
        client = LoadClient(self.url, model=None, api_key=None, timeout_s=120)
        try:
            await work(client)
        finally:
            await client.close()

    async def _ask(self, client: LoadClient, vocabulary: range) -> None:
        prompt = self._random.choices(vocabulary, k=self.prompt_tokens)
        record = await client.complete(prompt, self.max_tokens)
        self.records.append(record)
        if record.error is not None:
            await asyncio.sleep(0.5)

    @property
    def num_failed(self) -> int:
        return sum(record.error is not None for record in self.records)

    def throughput(self, begin: float, end: float) -> float:
        """Tokens per second that arrived between."""
        return self._num_generated(begin, end) / (end - begin)

    def computed_per_s(self, begin: float, end: float) -> float:
        """As `throughput`, with the prompts whose first answer arrived between."""
        prompts = sum(
            record.prompt_tokens
            for record in self.records
            if record.arrivals and begin <= record.arrivals[0][0] < end
        )
        return (prompts + self._num_generated(begin, end)) / (end - begin)

    def _num_generated(self, begin: float, end: float) -> int:
        return sum(
            count for record in self.records for at, count in record.arrivals if begin <= at < end
        )

    def p99_answer_ms(self, begin: float, end: float) -> float:
        """The 99th percentile of the time from a request that was sent between to the end of its
        answer; 0 without any."""
        times = sorted(
            record.finished_at - record.started_at
            for record in self.records
            if record.arrivals and begin <= record.started_at < end
        )
        return times[int(0.99 * len(times))] * 1000 if times else 0.0

    def p99_gap_ms(self, begin: float, end: float) -> float:
        """The 99th percentile of the time between two tokens of a stream; 0 without any."""
        gaps = sorted(
            after[0] - before[0]
            for record in self.records
            for before, after in zip(record.arrivals, record.arrivals[1:], strict=False)
            if begin <= after[0] < end
        )
        return gaps[int(0.99 * len(gaps))] * 1000 if gaps else 0.0
