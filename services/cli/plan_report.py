"""How a plan looks in the terminal, and as JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from services.cli.tables import titled_table
from services.core.model_config import ModelConfig
from services.core.planning.fleet import FleetPlan, Rates
from services.core.planning.gpus import Gpu
from services.core.planning.machine import Network
from services.core.planning.model_sizes import ModelSizes
from services.core.planning.weight_formats import weight_format
from services.core.planning.workload import Workload


def print_plans(
    console: Console,
    model: str,
    config: ModelConfig,
    card: Gpu,
    network: Network,
    workload: Workload,
    plans: list[FleetPlan],
) -> None:
    """Size of the model, then a table of fleets, their step by part, and what does not fit."""
    sizes = ModelSizes(config=config)
    console.print(
        f"{model}: {sizes.total_params / 1e9:.1f} B parameters, {sizes.active_params / 1e9:.1f} B "
        f"active; {workload.users} streams of {workload.context} tokens, requests of "
        f"{workload.prompt_tokens} uncached + {workload.output_tokens} tokens",
        highlight=False,
    )
    console.print(
        f"{card.name}: {card.memory_bytes / 1e9:.0f} GB, {card.bandwidth / 1e9:.0f} GB/s, "
        f"{card.bf16_flops / 1e12:.3g} TFLOP/s bf16, ${card.price_per_hour:.2f} an hour "
        f"(assumed unless given); network {network.bandwidth * 8e-9:.0f} Gbit/s, "
        f"{network.delay_s * 1e6:.0f} us each way",
        highlight=False,
    )
    console.print(_fleets(config, plans))
    if any(plan.rates for plan in plans):
        console.print(_steps(plans))
    for plan in plans:
        if plan.problem:
            console.print(f"{plan.weights}: {plan.problem}", highlight=False)


def _fleets(config: ModelConfig, plans: list[FleetPlan]) -> Table:
    """One column a precision."""
    table = titled_table("fleet")
    table.add_column("")
    for plan in plans:
        table.add_column(plan.weights, justify="right")
    sizes = [_sizes(config, plan.weights) for plan in plans]
    table.add_row("all weights, GB", *(f"{size.total_bytes / 1e9:.1f}" for size in sizes))
    table.add_row("one expert, GB", *(f"{size.expert_bytes / 1e9:.1f}" for size in sizes))
    for name, cell in _FLEET_ROWS:
        table.add_row(name, *(cell(plan) for plan in plans))
    for name, rate in _RATE_ROWS:
        table.add_row(name, *(rate(plan, plan.rates) if plan.rates else "-" for plan in plans))
    return table


_FLEET_ROWS: tuple[tuple[str, Callable[[FleetPlan], str]], ...] = (
    ("expert pods: layers each", lambda p: f"{p.pods.layers_per_pod}" if p.pods else "-"),
    ("  pods per copy", lambda p: f"{p.pods.pods_per_group}" if p.pods else "-"),
    ("  GB each", lambda p: f"{p.pods.pod_bytes / 1e9:.1f}" if p.pods else "-"),
    ("  replicas", lambda p: _replicas(p)),
    ("shards", lambda p: f"{p.num_shards}" if p.shard else "-"),
    ("  weights + KV, GB", lambda p: _shard_memory(p)),
    ("  streams each", lambda p: _streams(p)),
    ("cards", lambda p: f"{p.num_cards}" if p.rates else "-"),
)

_RATE_ROWS: tuple[tuple[str, Callable[[FleetPlan, Rates], str]], ...] = (
    ("TTFT, ms", lambda p, r: f"{r.ttft_s * 1e3:.0f}"),
    ("TPOT, ms", lambda p, r: f"{r.tpot_s * 1e3:.0f}"),
    ("  decode step alone, ms", lambda p, r: f"{r.decode.step_s * 1e3:.0f}"),
    ("tokens/s", lambda p, r: f"{p.tokens_per_s:.0f}"),
    ("$ an hour", lambda p, r: f"{p.dollars_per_hour:.2f}"),
    ("$ a million tokens", lambda p, r: f"{p.dollars_per_million_tokens:.2f}"),
    ("size is set by", lambda p, r: p.size_set_by),
    ("time is bound by", lambda p, r: f"{r.bound_by} {r.shares[r.bound_by]:.0%}"),
)


def _steps(plans: list[FleetPlan]) -> Table:
    """Decode: microseconds of one micro-batch in one layer, and the step's other parts."""
    table = titled_table("decode step")
    table.add_column("")
    for plan in plans:
        table.add_column(plan.weights, justify="right")
    rates = [plan.rates for plan in plans]
    for name, cell in _STEP_ROWS:
        table.add_row(name, *(cell(rate) if rate else "-" for rate in rates))
    return table


_STEP_ROWS: tuple[tuple[str, Callable[[Rates], str]], ...] = (
    ("micro-batches", lambda r: f"{r.layout.num_micro_batches}"),
    ("frames merged by a worker", lambda r: f"{_merged(r):.1f}"),
    ("layer: attention and gate, us", lambda r: f"{r.decode.layer.attention_s * 1e6:.0f}"),
    ("  dispatch and combine", lambda r: f"{r.decode.layer.dispatch_s * 1e6:.0f}"),
    ("  bytes on the wire", lambda r: f"{r.decode.layer.wire_s * 1e6:.0f}"),
    ("  network delay", lambda r: f"{r.decode.layer.delay_s * 1e6:.0f}"),
    ("  experts", lambda r: f"{r.decode.layer.expert_s * 1e6:.0f}"),
    ("  waiting for others", lambda r: f"{r.decode.layer.stall_s * 1e6:.0f}"),
    ("head, ms", lambda r: f"{r.decode.head_s * 1e3:.2f}"),
    (
        "sampling and engine, ms",
        lambda r: f"{(r.decode.sample_s + r.decode.overhead_s) * 1e3:.2f}",
    ),
    ("share: bandwidth", lambda r: f"{r.decode.shares['bandwidth']:.0%}"),
    ("share: compute", lambda r: f"{r.decode.shares['compute']:.0%}"),
    ("share: wire", lambda r: f"{r.decode.shares['wire']:.0%}"),
    ("share: round trips", lambda r: f"{r.decode.shares['round trips']:.0%}"),
)


def plan_json(
    model: str,
    config: ModelConfig,
    card: Gpu,
    network: Network,
    workload: Workload,
    plans: list[FleetPlan],
) -> dict[str, Any]:
    """Everything the tables have, in bytes and seconds; docs/planning.md lists the keys."""
    sizes = ModelSizes(config=config)
    return {
        "model": model,
        "total_params": sizes.total_params,
        "active_params": sizes.active_params,
        "gpu": asdict(card),
        "network": asdict(network),
        "workload": asdict(workload),
        "plans": [_plan_json(config, plan) for plan in plans],
    }


def _plan_json(config: ModelConfig, plan: FleetPlan) -> dict[str, Any]:
    sizes = _sizes(config, plan.weights)
    fields = asdict(plan)
    if plan.rates is not None:
        fields["rates"]["bound_by"] = plan.rates.bound_by
        fields["rates"]["decode"]["bound_by"] = plan.rates.decode.bound_by
    return fields | {"total_bytes": sizes.total_bytes, "expert_bytes": sizes.expert_bytes}


def _sizes(config: ModelConfig, weights: str) -> ModelSizes:
    return ModelSizes(config=config, weights=weight_format(weights))


def _replicas(plan: FleetPlan) -> str:
    if plan.rates is None:
        return "-"
    if plan.hot_replicas == plan.replicas:
        return f"{plan.replicas}"
    return f"{plan.replicas}, hot {plan.hot_replicas}"


def _shard_memory(plan: FleetPlan) -> str:
    if plan.shard is None:
        return "-"
    return f"{plan.shard.weight_bytes / 1e9:.1f} + {plan.shard.kv_pool_bytes / 1e9:.1f}"


def _streams(plan: FleetPlan) -> str:
    if plan.shard is None:
        return "-"
    return f"{plan.streams_per_shard} of {plan.shard.max_streams}"


def _merged(rates: Rates) -> float:
    """Frames of one layer that an expert without extra replicas computes at once."""
    layout = rates.layout
    return layout.num_in_flight / layout.clusters_of(layout.groups[-1])
