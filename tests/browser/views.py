"""Made-up views of a fleet, as `GET /v1/experts/view` tells them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from services.gateway.console.contract import (
    FleetView,
    LayerView,
    ShardStateView,
    SlowRequestView,
    WorkerStateView,
)

Slot = tuple[int, int]
NOW = 1_800_000_000.0
MIB = 1 << 20


def fleet_view(
    *,
    num_layers: int = 4,
    num_experts: int = 8,
    num_workers: int = 4,
    hot: Mapping[Slot, float] | None = None,
    rate: float = 100.0,
    states: Mapping[str, Literal["ready", "loading", "draining", "lost"]] | None = None,
    admin: bool = False,
    slow_requests: Sequence[SlowRequestView] = (),
    trace_url: str | None = None,
    store: Literal["ok", "away", "none"] = "ok",
) -> FleetView:
    """A fleet whose experts compute around `rate` tokens/s each, those in `hot` what it says.

    Expert `e` is held in all layers by worker `e % num_workers`.
    """
    states, hot = states or {}, hot or {}
    layers = [
        _layer(layer, num_experts, num_workers, rate, hot, states) for layer in range(num_layers)
    ]
    hottest = sorted(
        (
            (now, layer, expert)
            for layer, view in enumerate(layers)
            for expert, now in enumerate(view["now"] or [])
        ),
        key=lambda entry: -entry[0],
    )[:8]
    return {
        "at": NOW,
        "store": store,
        "gateway": "gateway-1",
        "model": {
            "name": "demo",
            "num_layers": num_layers,
            "num_experts": num_experts,
            "num_experts_per_tok": 2,
        },
        "load": {
            "source": "shards",
            "now_s": 2.0,
            "window_s": 60.0,
            "layers": layers,
            "hottest": [
                {
                    "layer": layer,
                    "expert": expert,
                    "tokens_per_second": now,
                    "share": now / sum(layers[layer]["now"] or [1.0]),
                    "replicas": layers[layer]["replicas"][expert],
                }
                for now, layer, expert in hottest
            ],
        },
        "workers": [
            _worker(index, num_layers, num_experts, num_workers, states)
            for index in range(num_workers)
        ],
        "shards": [shard()],
        "requests": {
            "running": 3,
            "waiting": 1,
            "ttft_ms": {"p50": 41.0, "p95": 120.0},
            "tpot_ms": {"p50": 8.2, "p95": 11.0},
        },
        "sessions": {"stored": 17},
        "slow_requests": list(slow_requests),
        "admin": admin,
        "trace_url": trace_url,
    }


def shard() -> ShardStateView:
    return {
        "shard_id": "shard-0",
        "state": "ready",
        "seen_s": 0.4,
        "lost_at": None,
        "host": "node-a",
        "pid": 4711,
        "started_at": NOW - 600,
        "num_running": 12,
        "num_waiting": 0,
        "waiting_tokens": 0,
        "max_num_seqs": 64,
        "kv_blocks_used": 300,
        "kv_blocks_total": 1000,
        "tokens_per_second": 480.0,
        "saturation": 0.19,
        "ttft_ms": {"p50": 41.0, "p95": 120.0},
        "tpot_ms": {"p50": 8.2, "p95": 11.0},
    }


def slow_request(request_id: str, *, trace_id: str | None, duration_s: float) -> SlowRequestView:
    return {
        "request_id": request_id,
        "trace_id": trace_id,
        "model": "demo",
        "started_at": NOW - 30,
        "duration_s": duration_s,
        "ttft_s": 0.2,
        "num_prompt_tokens": 120,
        "num_generated_tokens": 48,
        "status": 200,
    }


def completion(
    *, num_layers: int = 4, num_experts: int = 8, num_tokens: int = 12, hostile: str = ""
) -> dict[str, Any]:
    """An answer of `/v1/completions` with expert choices; the prompt's first token is `hostile`."""
    prompt = [hostile or "def", " f", "(x", "):", "\n"]
    texts = [f" t{index}" for index in range(num_tokens)]

    def experts(token: int) -> list[list[int]]:
        return [chosen_experts(token, layer, num_experts) for layer in range(num_layers)]

    return {
        "id": "cmpl-1",
        "choices": [
            {
                "text": "".join(texts),
                "expert_choices": {
                    "num_layers": num_layers,
                    "top_k": 2,
                    "prompt": {"tokens": prompt, "experts": [experts(t) for t in range(5)]},
                    "completion": {
                        "tokens": texts,
                        "experts": [*(experts(5 + t) for t in range(num_tokens - 1)), None],
                    },
                    "repeats": [
                        {"layer": layer, "first": 0.14 + 0.01 * layer, "any": 0.46}
                        for layer in range(num_layers)
                    ],
                    "random_first": 1 / num_experts,
                    "random_any": 0.4643,
                },
            }
        ],
        "usage": {"prompt_tokens": 5, "completion_tokens": num_tokens},
    }


def chosen_experts(token: int, layer: int, num_experts: int = 8) -> list[int]:
    """First and second choice that `completion` makes up."""
    first = (token * 3 + layer) % num_experts
    return [first, (first + 1 + layer) % num_experts]


def trace() -> dict[str, Any]:
    """One request of a second: queue, prefill, decode, and a sampled step with two workers."""
    layers = [
        _span(
            "expertfleet.engine.layer",
            f"l{layer}",
            "s1",
            305.0 + 10 * layer,
            9.0,
            attributes={
                "expertfleet.layer": layer,
                "expertfleet.num_tokens": 7,
                "expertfleet.expert_ids": [0, 3],
                "expertfleet.tokens_per_expert": [5, 2],
            },
            children=[_dispatch(layer, worker, 305.0 + 10 * layer) for worker in range(2)],
        )
        for layer in range(2)
    ]
    step = _span(
        "expertfleet.engine.step",
        "s1",
        "g1",
        300.0,
        30.0,
        attributes={
            "expertfleet.step": 42,
            "expertfleet.num_seqs": 3,
            "expertfleet.num_tokens": 7,
            "expertfleet.num_prefill_tokens": 0,
        },
        children=layers,
    )
    return {
        "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736",
        "request_id": "req-1",
        "started_at": NOW - 30,
        "duration_ms": 1000.0,
        "is_truncated": False,
        "is_partial": False,
        "spans": [
            _span("expertfleet.gateway.request", "r1", None, 0.0, 1000.0),
            _span("expertfleet.shard.generate", "g1", "r1", 5.0, 990.0),
            _span("expertfleet.shard.queue", "q1", "g1", 5.0, 95.0),
            _span("expertfleet.shard.prefill", "p1", "g1", 100.0, 200.0),
            _span("expertfleet.shard.decode", "d1", "g1", 300.0, 695.0),
        ],
        "steps": [{**step, "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736", "is_linked": False}],
    }


def _dispatch(layer: int, worker: int, start_ms: float) -> dict[str, Any]:
    """8 ms, of it 1 ms queue and 4 ms compute; the second worker is half as slow."""
    scale = 1.0 / (1 + worker)
    return _span(
        "expertfleet.dispatch",
        f"x{layer}{worker}",
        f"l{layer}",
        start_ms,
        8.0 * scale,
        attributes={
            "expertfleet.layer": layer,
            "expertfleet.worker_id": f"expert-{worker}",
            "expertfleet.num_tokens": 5,
            "expertfleet.expert_ids": [3 * worker],
            "expertfleet.tokens_per_expert": [5],
            "expertfleet.num_retries": 0,
            "expertfleet.queue_ms": 1.0 * scale,
            "expertfleet.compute_ms": 4.0 * scale,
        },
    )


def _span(
    name: str,
    span_id: str,
    parent_id: str | None,
    start_ms: float,
    duration_ms: float,
    *,
    attributes: Mapping[str, Any] | None = None,
    children: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    span: dict[str, Any] = {
        "span_id": span_id,
        "parent_id": parent_id,
        "name": name,
        "service": "expertfleet-shard",
        "instance": "shard-0",
        "start_ms": start_ms,
        "duration_ms": duration_ms,
        "attributes": dict(attributes or {}),
        "events": [],
        "links": [],
        "error": None,
    }
    return span if children is None else {**span, "children": list(children)}


def _layer(
    layer: int,
    num_experts: int,
    num_workers: int,
    rate: float,
    hot: Mapping[Slot, float],
    states: Mapping[str, str],
) -> LayerView:
    now = [
        hot.get((layer, expert), rate * (1 + 0.3 * math.sin(1.7 * expert + layer)))
        for expert in range(num_experts)
    ]
    window = [value / 2 for value in now]
    total = sum(now)
    replicas = [
        0 if states.get(f"expert-{expert % max(1, num_workers)}") == "lost" else 1
        for expert in range(num_experts)
    ]
    return {
        "now": now,
        "window": window,
        "imbalance_now": max(now) * num_experts / total if total else None,
        "imbalance": max(window) * num_experts / sum(window) if total else None,
        "replicas": replicas,
        "tokens": [int(value * 600) for value in now],
    }


def _worker(
    index: int,
    num_layers: int,
    num_experts: int,
    num_workers: int,
    states: Mapping[str, Literal["ready", "loading", "draining", "lost"]],
) -> WorkerStateView:
    worker_id = f"expert-{index}"
    state = states.get(worker_id, "ready")
    return {
        "worker_id": worker_id,
        "endpoint": f"node-{index}:5005{index}",
        "state": state,
        "seen_s": 7.0 if state == "lost" else 0.3,
        "lost_at": NOW - 4 if state == "lost" else None,
        "device": "cpu",
        "host": f"node-{index}",
        "pid": 5000 + index,
        "started_at": NOW - 600,
        "slots": [
            (layer, expert)
            for layer in range(num_layers)
            for expert in range(index, num_experts, num_workers)
        ],
        "weight_bytes": 300 * MIB,
        "memory_free_bytes": 700 * MIB,
        "memory_limit_bytes": 1000 * MIB,
        "queue_ms": 0.4,
        "compute_ms": 1.6,
        "busy": 0.35,
        "tokens_per_second": 800.0,
        "num_frames": 12345,
    }
