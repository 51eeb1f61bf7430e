"""`GET` and `DELETE /v1/sessions/{id}`: what is stored of a conversation."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request

from services.core.errors import NotFoundError
from services.gateway.auth import tenant_of
from services.gateway.gateway import Gateway


def sessions_router(gateway: Gateway) -> APIRouter:
    router = APIRouter(dependencies=[Depends(gateway.authenticate)])

    async def get_session(request: Request, session_id: str) -> dict[str, Any]:
        session = await gateway.shard.get_session(tenant_of(request), session_id)
        if session is None:
            raise _no_session(session_id)
        return {
            "id": session.session_id,
            "object": "session",
            "num_tokens": session.num_tokens,
            "num_blocks": session.num_blocks,
            "stored_bytes": session.stored_bytes,
            "created_at": session.created_at,
            "updated_at": session.updated_at,
            "expires_at": session.expires_at,
        }

    async def delete_session(request: Request, session_id: str) -> dict[str, Any]:
        if not await gateway.shard.delete_session(tenant_of(request), session_id):
            raise _no_session(session_id)
        return {"id": session_id, "object": "session", "deleted": True}

    router.add_api_route("/v1/sessions/{session_id}", get_session, methods=["GET"])
    router.add_api_route("/v1/sessions/{session_id}", delete_session, methods=["DELETE"])
    return router


def _no_session(session_id: str) -> NotFoundError:
    return NotFoundError(f"There is no session {session_id!r}", param="session_id")
