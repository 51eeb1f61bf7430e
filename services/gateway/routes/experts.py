"""`GET /v1/experts`: which worker holds which experts, and how hard each expert works."""

from __future__ import annotations

import time
from dataclasses import asdict
from itertools import product
from typing import Any

from fastapi import APIRouter, Depends

from services.core.registry import FleetSnapshot, ShardRecord, WorkerRecord
from services.gateway.expert_load import expert_tokens, layer_loads, missing_slots, source_of
from services.gateway.gateway import Gateway


def experts_router(gateway: Gateway) -> APIRouter:
    router = APIRouter(dependencies=[Depends(gateway.authenticate)])
    config = gateway.model.config

    async def get_experts() -> dict[str, Any]:
        registry = gateway.registry
        snapshot = FleetSnapshot() if registry is None else await registry.snapshot()
        all_slots = product(range(config.num_hidden_layers), range(config.num_local_experts))
        return {
            "object": "experts",
            "model": gateway.model.name,
            "num_layers": config.num_hidden_layers,
            "num_experts": config.num_local_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            "workers": [_worker(worker) for worker in snapshot.workers],
            "shards": [_shard(shard) for shard in snapshot.shards],
            # Without workers the experts are in the shard's own process: none is missing.
            "missing": missing_slots(snapshot.workers, all_slots) if snapshot.workers else [],
            "load": _load(gateway, snapshot),
        }

    router.add_api_route("/v1/experts", get_experts, methods=["GET"])
    return router


def _load(gateway: Gateway, snapshot: FleetSnapshot) -> dict[str, Any]:
    config = gateway.model.config
    measured = gateway.load_history.rates(snapshot, time.time())
    rates, window_s = measured if measured else (None, None)
    tokens = expert_tokens(snapshot)
    layers = layer_loads(
        tokens,
        rates,
        num_layers=config.num_hidden_layers if config.is_moe else 0,
        num_experts=config.num_local_experts,
    )
    return {
        "source": source_of(snapshot.shards),
        "total_tokens": sum(tokens.values()),
        "window_s": window_s,
        "layers": [asdict(layer) for layer in layers],
    }


def _worker(worker: WorkerRecord) -> dict[str, Any]:
    return {
        "worker_id": worker.worker_id,
        "endpoint": worker.endpoint,
        "state": worker.state,
        "device": worker.device,
        "host": worker.host,
        "pid": worker.pid,
        "started_at": worker.started_at,
        "experts": sorted({expert for _, expert in worker.slots}),
        "slots": sorted(worker.slots),
        "weight_bytes": worker.weight_bytes,
        "memory_free_bytes": worker.memory_free_bytes,
        "queue_ms": worker.queue_ms,
        "compute_ms": worker.compute_ms,
        "num_frames": worker.num_frames,
        "tokens": sum(worker.tokens.values()),
        "metrics_endpoint": worker.metrics_endpoint,
    }


def _shard(shard: ShardRecord) -> dict[str, Any]:
    return {
        "shard_id": shard.shard_id,
        "host": shard.host,
        "pid": shard.pid,
        "started_at": shard.started_at,
        "num_running": shard.num_running,
        "num_waiting": shard.num_waiting,
        "waiting_tokens": shard.waiting_tokens,
        "kv_blocks_used": shard.kv_blocks_used,
        "kv_blocks_total": shard.kv_blocks_total,
        "num_generated_tokens": shard.num_generated_tokens,
        "num_prefilled_tokens": shard.num_prefilled_tokens,
        "metrics_endpoint": shard.metrics_endpoint,
    }
