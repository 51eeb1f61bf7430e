"""What the console's page is told: the JSON of `GET /v1/experts/view` and of each event.

Numbers that are not known are null. Rates are per second, times Unix seconds.
"""

from __future__ import annotations

from typing import Literal, TypedDict


class Percentiles(TypedDict):
    p50: float
    p95: float


class ModelView(TypedDict):
    name: str
    num_layers: int
    num_experts: int
    num_experts_per_tok: int


class LayerView(TypedDict):
    """One layer; every list has one entry an expert. Imbalance is the largest rate over the mean.

    `now` and `window` are tokens per second over the short and the long window. `replicas` counts
    ready workers that hold the expert, `tokens` since the processes that are alive started.
    """

    now: list[float] | None
    window: list[float] | None
    imbalance_now: float | None
    imbalance: float | None
    replicas: list[int]
    tokens: list[int]


class HotExpert(TypedDict):
    """`share` is that of its layer's tokens, both by the short window."""

    layer: int
    expert: int
    tokens_per_second: float
    share: float
    replicas: int


class LoadView(TypedDict):
    """`source` says whose counts these are. `now_s` and `window_s` are the seconds that the short
    and the long window span, by the leases' own times."""

    source: str
    now_s: float | None
    window_s: float | None
    layers: list[LayerView]
    hottest: list[HotExpert]


class WorkerStateView(TypedDict):
    """`lost` is a worker whose lease is overdue or ran out; `seen_s` are the seconds since its
    lease was last seen renewed, `lost_at` when it was last lost, if within a minute."""

    worker_id: str
    endpoint: str
    state: Literal["ready", "loading", "draining", "lost"]
    seen_s: float
    lost_at: float | None
    device: str
    host: str
    pid: int
    started_at: float
    slots: list[tuple[int, int]]
    weight_bytes: int
    memory_free_bytes: int
    memory_limit_bytes: int
    queue_ms: float
    compute_ms: float
    busy: float | None
    tokens_per_second: float | None
    num_frames: int


class ShardStateView(TypedDict):
    """`tokens_per_second` are generated tokens, `saturation` is the share of its time that the
    shard spends in full steps (None: it does not tell). TTFT and TPOT are of this gateway's
    requests there, over the long window."""

    shard_id: str
    state: Literal["ready", "lost"]
    seen_s: float
    lost_at: float | None
    host: str
    pid: int
    started_at: float
    num_running: int
    num_waiting: int
    waiting_tokens: int
    max_num_seqs: int | None
    kv_blocks_used: int
    kv_blocks_total: int
    tokens_per_second: float | None
    saturation: float | None
    ttft_ms: Percentiles | None
    tpot_ms: Percentiles | None


class RequestsView(TypedDict):
    """Of this gateway: requests with and without a first token, latencies over the long window."""

    running: int
    waiting: int
    ttft_ms: Percentiles | None
    tpot_ms: Percentiles | None


class SessionsView(TypedDict):
    stored: int | None


class SlowRequestView(TypedDict):
    """`started_at` is Unix seconds; `trace_id` is null where the request was not sampled."""

    request_id: str
    trace_id: str | None
    model: str
    started_at: float
    duration_s: float
    ttft_s: float | None
    num_prompt_tokens: int
    num_generated_tokens: int
    status: int


class FleetView(TypedDict):
    """`store` says whether the leases could be read: "away" means that the fleet is shown as last
    seen, "none" that there is no store. `gateway` names the process that `requests` and
    `slow_requests` are of."""

    at: float
    store: Literal["ok", "away", "none"]
    gateway: str
    model: ModelView
    load: LoadView
    workers: list[WorkerStateView]
    shards: list[ShardStateView]
    requests: RequestsView
    sessions: SessionsView
    slow_requests: list[SlowRequestView]
    admin: bool
    trace_url: str | None
