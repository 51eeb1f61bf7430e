"""The attention shards of the fleet, found by their leases: the gateway's `ShardClient`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from services.core.errors import DrainingError, PeerTlsError, ShardLostError, UnavailableError
from services.core.generation import GenerateRequest, GenerationDelta, SessionInfo
from services.core.registry import Registry, ShardRecord
from services.core.tls import PeerTls
from services.gateway.beat_watch import TICK_S, BeatWatch
from services.gateway.console.activity import Activity
from services.gateway.console.shard_timer import ShardTimer
from services.gateway.shard_choice import RUNNING_COST, ShardChooser, session_shard
from services.gateway.shard_link import ShardLink

log = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S = 2.0
_FIRST_BACKOFF_S = 0.05
_MAX_BACKOFF_S = 1.0


@dataclass(slots=True, kw_only=True, eq=False)
class _Member:
    """A shard of the registry. `link` is None while it cannot be reached."""

    record: ShardRecord
    beats: BeatWatch = field(default_factory=BeatWatch)
    task: asyncio.Task[None] | None = None
    link: ShardLink | None = None
    is_draining: bool = False


class ShardPool:
    """Used on one event loop; does not own the registry.

    The registry is read every `refresh_s`. A shard whose lease is missing is kept as long as its
    link holds: the store may have lost the lease, or take no new ones. A shard that says that it is
    draining gets nothing new. What a shard has stays with it until it ends or the shard is gone.
    One that hangs counts as gone while another takes requests, and is used again once it answers.
    `activity` is told how long each request took its shard.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        refresh_s: float = 0.5,
        tls: PeerTls | None = None,
        activity: Activity | None = None,
    ) -> None:
        self._registry = registry
        self._activity = activity
        self._tls = tls
        self._refresh_s = refresh_s
        self._chooser = ShardChooser()
        self._members: dict[str, _Member] = {}
        self._follower: asyncio.Task[None] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._has_read = asyncio.Event()

    @property
    def joined(self) -> list[str]:
        """Ids of the shards that take requests."""
        return list(self._joined_links())

    async def generate(
        self, request: GenerateRequest
    ) -> AsyncGenerator[tuple[GenerationDelta, ...], None]:
        """See `ShardClient.generate`. Raises `ShardLostError` where another shard, or the same one
        once it is back, could go on."""
        member, link = await self._choose(request)
        timer = ShardTimer(request)
        try:
            async with aclosing(link.generate(request)) as stream:
                async for deltas in stream:
                    timer.take(deltas)
                    yield deltas
        except DrainingError as error:
            member.is_draining = True
            raise ShardLostError(f"shard {link.shard_id} is draining", reason="drained") from error
        except ShardLostError as error:
            # Told before its lease tells: a session's request must not be sent there again.
            member.is_draining |= error.reason == "drained"
            raise
        finally:
            if self._activity is not None:
                self._activity.shard_served(link.shard_id, timer.ttft_s, timer.tpot_s)

    async def get_session(self, tenant: str, session_id: str) -> SessionInfo | None:
        links = await self._links()
        shard_id = session_shard(tenant, session_id, list(links))
        return await links[shard_id].get_session(tenant, session_id)

    async def delete_session(self, tenant: str, session_id: str) -> bool:
        links = await self._links()
        shard_id = session_shard(tenant, session_id, list(links))
        return await links[shard_id].delete_session(tenant, session_id)

    async def check_ready(self) -> None:
        """Return when one shard could serve; raises `UnavailableError` with what is missing."""
        missing: UnavailableError | None = None
        for link in (await self._links()).values():
            try:
                await link.check_ready()
            except UnavailableError as error:
                missing = error
            else:
                return
        assert missing is not None
        raise missing

    async def close(self) -> None:
        for following in (self._follower, self._watcher):
            if following is not None:
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)
        tasks = [member.task for member in self._members.values() if member.task]
        self._members.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _choose(self, request: GenerateRequest) -> tuple[_Member, ShardLink]:
        links = await self._links()
        load = {shard_id: self._load(shard_id) for shard_id in links}
        shard_id = self._chooser.choose(request, load)
        return self._members[shard_id], links[shard_id]

    def _load(self, shard_id: str) -> float:
        """In waiting tokens: what this gateway knows of, or what the lease says of all gateways."""
        member = self._members[shard_id]
        assert member.link is not None
        told = member.record.waiting_tokens + RUNNING_COST * member.record.num_running
        return max(member.link.cost, told)

    async def _links(self) -> dict[str, ShardLink]:
        """Of the shards that take requests, at least one. Raises `ShardLostError`."""
        if self._follower is None:
            self._follower = asyncio.create_task(self._follow_registry(), name="shards")
            self._watcher = asyncio.create_task(self._watch_beats(), name="shards' beats")
        await self._has_read.wait()
        links = self._joined_links()
        if not links:
            raise ShardLostError(
                "no attention shard is up; see the shards' logs", reason="unreachable"
            )
        return links

    def _joined_links(self) -> dict[str, ShardLink]:
        return {
            shard_id: member.link
            for shard_id, member in self._members.items()
            if member.link is not None
            and not member.link.broken.is_set()
            and not member.is_draining
        }

    async def _watch_beats(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            for member in self._members.values():
                member.beats.tick(loop.time())
            self._give_up_silent()
            await asyncio.sleep(TICK_S)

    def _give_up_silent(self) -> None:
        """Only while a shard that is not silent takes requests: one that is alone is waited for."""
        silent = [
            member
            for member in self._members.values()
            if member.link is not None
            and member.beats.is_silent
            and not member.link.broken.is_set()
        ]
        if silent and any(not link.beats.is_silent for link in self._joined_links().values()):
            for member in silent:
                assert member.link is not None
                member.link.give_up(f"it was silent for {member.beats.silent_s:.2f} s")
                member.beats.given_up()

    async def _follow_registry(self) -> None:
        is_away = False
        while True:
            try:
                self._update((await self._registry.snapshot()).shards)
                is_away = False
            except UnavailableError as error:
                if not is_away:
                    log.warning("going on with the shards last seen: %s", error.message)
                is_away = True
            if not self._has_read.is_set():
                await self._wait_joined()
            self._has_read.set()
            await asyncio.sleep(self._refresh_s)

    async def _wait_joined(self) -> None:
        """At the start: until each shard was tried once."""
        give_up_at = asyncio.get_running_loop().time() + _CONNECT_TIMEOUT_S
        while any(member.link is None for member in self._members.values()):
            if asyncio.get_running_loop().time() > give_up_at:
                return
            await asyncio.sleep(_FIRST_BACKOFF_S)

    def _update(self, records: tuple[ShardRecord, ...]) -> None:
        seen = {record.shard_id: record for record in records if record.endpoint}
        for shard_id, record in seen.items():
            member = self._members.get(shard_id)
            if member is None:
                member = self._members[shard_id] = _Member(record=record)
                member.task = asyncio.create_task(self._keep_joined(member), name=shard_id)
            member.record = record
        for shard_id, member in list(self._members.items()):
            if shard_id not in seen and member.link is None:
                del self._members[shard_id]
                if member.task is not None:
                    member.task.cancel()

    async def _keep_joined(self, member: _Member) -> None:
        """Connect, wait until the link breaks, and again, while the shard is a member."""
        record, backoff_s, refusal = member.record, _FIRST_BACKOFF_S, ""
        while True:
            link = ShardLink(
                record.shard_id, record.endpoint or "", tls=self._tls, beats=member.beats
            )
            try:
                await link.connect(_CONNECT_TIMEOUT_S)
                member.link, backoff_s = link, _FIRST_BACKOFF_S
                log.info("shard %s joined", record.shard_id)
                await link.broken.wait()
                log.info("shard %s left: %s", record.shard_id, link.reason)
            except PeerTlsError as error:
                if error.message != refusal:
                    log.error("%s", error.message)
                refusal = error.message
            except UnavailableError as error:
                log.info("%s", error.message)
            finally:
                member.link = None
                await link.close()
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)
