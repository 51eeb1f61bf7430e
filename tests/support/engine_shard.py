"""An engine as the gateway sees a shard, without sessions."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from router_service.engine.engine import Engine
from services.core.generation import GenerateRequest, GenerationDelta, SessionInfo


class EngineShard:
    """A `ShardClient` in the engine's own process."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def generate(
        self, request: GenerateRequest
    ) -> AsyncGenerator[tuple[GenerationDelta, ...], None]:
        return self.engine.generate(request)

    async def get_session(self, tenant: str, session_id: str) -> SessionInfo | None:
        return None

    async def delete_session(self, tenant: str, session_id: str) -> bool:
        return False

    async def check_ready(self) -> None:
        self.engine.check_ready()
