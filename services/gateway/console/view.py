"""Builds what the console's page is told from what the gateway knows. Pure: no clock, no I/O."""

from __future__ import annotations

from typing import Literal

from services.core.model_config import ModelConfig
from services.core.registry import ShardRecord, WorkerRecord
from services.gateway.console.activity import Activity
from services.gateway.console.contract import (
    FleetView,
    ModelView,
    ShardStateView,
    WorkerStateView,
)
from services.gateway.console.fleet_state import FleetState
from services.gateway.console.latencies import Latencies
from services.gateway.console.load_view import build_load
from services.gateway.console.sightings import Sighting
from services.gateway.console.windows import FleetWindows
from services.gateway.intake import Intake


class ViewBuilder:
    """`gateway` names this process, `trace_url` is where a trace is shown, with `{trace_id}`."""

    def __init__(
        self,
        *,
        model_name: str,
        config: ModelConfig,
        gateway: str,
        has_admin: bool,
        trace_url: str | None,
    ) -> None:
        self._config = config
        self._gateway = gateway
        self._has_admin = has_admin
        self._trace_url = trace_url
        self._model: ModelView = {
            "name": model_name,
            "num_layers": config.num_hidden_layers,
            "num_experts": config.num_local_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
        }

    def build(
        self,
        fleet: FleetState,
        activity: Activity,
        intake: Intake,
        *,
        num_sessions: int | None,
        now: float,
    ) -> FleetView:
        """`now` is Unix seconds."""
        at, shards = fleet.read_at, fleet.shards.all()
        return {
            "at": round(now, 3),
            "store": fleet.store,
            "gateway": self._gateway,
            "model": self._model,
            "load": build_load(fleet, self._config),
            "workers": [_worker(each, fleet.windows, at) for each in fleet.workers.all()],
            "shards": [
                _shard(
                    each,
                    fleet.windows,
                    activity.of_shard(each.record.shard_id, num_shards=len(shards)),
                    at,
                )
                for each in shards
            ],
            "requests": {
                "running": intake.num_running,
                "waiting": intake.num_requests,
                "ttft_ms": activity.latencies.ttft.percentiles(now),
                "tpot_ms": activity.latencies.tpot.percentiles(now),
            },
            "sessions": {"stored": num_sessions},
            "slow_requests": activity.slow_requests.slowest(now),
            "admin": self._has_admin,
            "trace_url": self._trace_url,
        }


def is_news(view: FleetView, before: FleetView) -> bool:
    """Whether anything but the passing of time differs."""
    return _without_time(view) != _without_time(before)


def _without_time(view: FleetView) -> dict[str, object]:
    return {
        **view,
        "at": None,
        "load": {**view["load"], "now_s": None, "window_s": None},
        "workers": [{**worker, "seen_s": None} for worker in view["workers"]],
        "shards": [{**shard, "seen_s": None} for shard in view["shards"]],
    }


def _worker(sighting: Sighting[WorkerRecord], windows: FleetWindows, now: float) -> WorkerStateView:
    record, rates = sighting.record, windows.of(sighting.record.worker_id, now).now
    state: Literal["ready", "loading", "draining", "lost"] = record.state
    if sighting.is_lost:
        state, rates = "lost", None
    return {
        "worker_id": record.worker_id,
        "endpoint": record.endpoint,
        "state": state,
        "seen_s": round(now - sighting.seen_at, 2),
        "lost_at": sighting.lost_at,
        "device": record.device,
        "host": record.host,
        "pid": record.pid,
        "started_at": record.started_at,
        "slots": sorted(record.slots),
        "weight_bytes": record.weight_bytes,
        "memory_free_bytes": record.memory_free_bytes,
        "memory_limit_bytes": record.memory_limit_bytes,
        "queue_ms": round(record.queue_ms, 3),
        "compute_ms": round(record.compute_ms, 3),
        "busy": min(1.0, round(rates.counters.get("busy_s", 0.0), 3)) if rates else None,
        "tokens_per_second": round(rates.counters.get("tokens", 0.0), 2) if rates else None,
        "num_frames": record.num_frames,
    }


def _shard(
    sighting: Sighting[ShardRecord],
    windows: FleetWindows,
    latencies: Latencies | None,
    now: float,
) -> ShardStateView:
    record, rates = sighting.record, windows.of(sighting.record.shard_id, now).now
    is_timed = latencies is not None and not sighting.is_lost
    return {
        "shard_id": record.shard_id,
        "state": "lost" if sighting.is_lost else "ready",
        "seen_s": round(now - sighting.seen_at, 2),
        "lost_at": sighting.lost_at,
        "host": record.host,
        "pid": record.pid,
        "started_at": record.started_at,
        "num_running": record.num_running,
        "num_waiting": record.num_waiting,
        "waiting_tokens": record.waiting_tokens,
        "max_num_seqs": record.max_num_seqs or None,
        "kv_blocks_used": record.kv_blocks_used,
        "kv_blocks_total": record.kv_blocks_total,
        "tokens_per_second": round(rates.counters.get("generated", 0.0), 2) if rates else None,
        "saturation": round(rates.counters["full_s"], 2) if rates and record.step_s else None,
        "ttft_ms": latencies.ttft.percentiles(now) if latencies and is_timed else None,
        "tpot_ms": latencies.tpot.percentiles(now) if latencies and is_timed else None,
    }
