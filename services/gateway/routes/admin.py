"""`/admin`: acts on the fleet, for those who hold the admin key."""

from __future__ import annotations

import hmac
from hashlib import sha256
from typing import Any

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field

from services.core.errors import AuthenticationError, InvalidRequestError
from services.gateway.body import read_body
from services.gateway.boundary import request_info
from services.gateway.console.administration import Administration, WorkerHeld
from services.gateway.errors import AdministrationOffError
from services.gateway.gateway import Gateway

_MAX_BODY_BYTES = 4096


class ReplicasBody(BaseModel):
    """How many ready replicas an expert is to have, and who shall load or unload one."""

    model_config = ConfigDict(extra="forbid", strict=True)

    replicas: int = Field(ge=1, le=1024)
    worker_id: str | None = None


class AdminKey:
    """FastAPI dependency. Raises `AdministrationOffError` without a key configured, and
    `AuthenticationError` for a request without it."""

    def __init__(self, key: str | None) -> None:
        self._digest = sha256(key.encode()).digest() if key else None

    async def __call__(self, request: Request) -> None:
        if self._digest is None:
            raise AdministrationOffError(
                "Administration is off: start the gateway with EXPERTFLEET_ADMIN_KEY to turn it on"
            )
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = sha256(key.strip().encode()).digest()
        if scheme.lower() != "bearer" or not hmac.compare_digest(given, self._digest):
            raise AuthenticationError(
                "This needs the admin key: send the header Authorization: Bearer ADMIN_KEY"
            )


def admin_router(gateway: Gateway, administration: Administration) -> APIRouter:
    router = APIRouter(dependencies=[Depends(AdminKey(gateway.settings.admin_key))])
    config = gateway.model.config

    async def drain(worker_id: str) -> dict[str, Any]:
        """`unserved`: slots that now wait for another worker, or for this one to come back."""
        unserved = await administration.drain(worker_id)
        return {"worker_id": worker_id, "state": "draining", "unserved": unserved}

    async def set_replicas(request: Request, layer: str, expert: str) -> dict[str, Any]:
        slot = (
            _index("layer", layer, config.num_hidden_layers),
            _index("expert", expert, config.num_local_experts),
        )
        place = request_info(request.scope).place = gateway.intake.enter()
        body = await read_body(request, ReplicasBody, _MAX_BODY_BYTES, place)
        held = await administration.set_replicas(slot, body.replicas, body.worker_id)
        return {
            "layer": slot[0],
            "expert": slot[1],
            "replicas": sum(slot in each.slots for each in held),
            "workers": [_held(each) for each in held],
        }

    router.add_api_route("/admin/workers/{worker_id}/drain", drain, methods=["POST"])
    router.add_api_route("/admin/experts/{layer}/{expert}/replicas", set_replicas, methods=["POST"])
    return router


def _index(name: str, given: str, count: int) -> int:
    if not (given.isascii() and given.isdecimal()) or len(given) > 9 or int(given) >= count:
        raise InvalidRequestError(
            f"{name} must be a number from 0 to {count - 1} (got {given!r})", param=name
        )
    return int(given)


def _held(held: WorkerHeld) -> dict[str, Any]:
    return {
        "worker_id": held.worker_id,
        "action": held.action,
        "slots": sorted(held.slots),
        "memory_free_bytes": held.memory_free_bytes,
    }
