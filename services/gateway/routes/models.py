"""`GET /v1/models` and `GET /v1/models/{id}`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends

from services.gateway.gateway import Gateway


def models_router(gateway: Gateway) -> APIRouter:
    router = APIRouter(dependencies=[Depends(gateway.authenticate)])
    model = gateway.model
    description = {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "expertfleet",
        "max_model_len": model.max_model_len,
    }

    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [description]}

    async def get_model(model_id: str) -> dict[str, Any]:
        model.check_name(model_id)
        return description

    router.add_api_route("/v1/models", list_models, methods=["GET"])
    router.add_api_route("/v1/models/{model_id:path}", get_model, methods=["GET"])
    return router
