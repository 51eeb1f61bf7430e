"""Workers told over gRPC, which is imported at the first act: most gateways never need it here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from services.core.registry import Slot
from services.core.settings import Settings
from services.gateway.console.administration import DRAIN_TIMEOUT_S, LOAD_TIMEOUT_S

if TYPE_CHECKING:
    from services.core.tls import PeerTls
    from services.core.worker_control import SlotsHeld


class WorkerAccess:
    """A `WorkerControl`, with the certificates of `settings` where it has some."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    async def load(
        self, endpoint: str, slots: Iterable[Slot], carrier: Mapping[str, str]
    ) -> SlotsHeld:
        from services.core.worker_control import load_slots

        return await load_slots(
            endpoint, slots, timeout_s=LOAD_TIMEOUT_S, carrier=carrier, tls=self._tls
        )

    async def unload(
        self, endpoint: str, slots: Iterable[Slot], carrier: Mapping[str, str]
    ) -> SlotsHeld:
        from services.core.worker_control import unload_slots

        return await unload_slots(
            endpoint, slots, timeout_s=LOAD_TIMEOUT_S, carrier=carrier, tls=self._tls
        )

    async def drain(self, endpoint: str) -> None:
        from services.core.worker_control import drain_worker

        await drain_worker(endpoint, timeout_s=DRAIN_TIMEOUT_S, tls=self._tls)

    @cached_property
    def _tls(self) -> PeerTls | None:
        from services.core.tls import peer_tls

        return peer_tls(self._settings)
