"""`expertfleet traces`: what the locally written spans say."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from services.cli.state_folder import default_state_dir
from services.cli.tables import titled_table
from services.core import telemetry
from services.core.errors import NotFoundError
from services.core.settings import load_settings
from services.core.span_file import SpanRecord, read_spans
from services.core.trace_report import (
    ExpertLoad,
    PhaseTimes,
    RequestSummary,
    TreeRow,
    find_trace,
    load_by_expert,
    slowest_requests,
    time_by_phase,
    trace_tree,
)
from services.core.tracing import trace_folder

TREE_ATTRIBUTES = (
    telemetry.ATTR_LAYER,
    telemetry.ATTR_WORKER_ID,
    telemetry.ATTR_NUM_TOKENS,
    telemetry.ATTR_TOKENS_PER_EXPERT,
    telemetry.ATTR_QUEUE_MS,
    telemetry.ATTR_COMPUTE_MS,
)


def traces(
    request: Annotated[
        str | None, typer.Argument(help="request id or start of a trace id: show it as a tree")
    ] = None,
    state_dir: Annotated[Path | None, typer.Option(help="state folder of the product")] = None,
    limit: Annotated[int, typer.Option(min=1, help="how many slow requests")] = 10,
) -> None:
    """Show slow requests, time by phase and load by expert; or one request as a tree."""
    folder = trace_folder(state_dir or load_settings().state_dir or default_state_dir())
    spans = list(read_spans(folder)) if folder.is_dir() else []
    if not spans:
        raise NotFoundError(
            f"there are no spans in {folder}; name the product's state folder with --state-dir "
            "(with an OTLP endpoint set, spans go there instead)"
        )
    console = Console()
    if request is not None:
        _print_tree(console, spans, request)
        return
    console.print(_slowest(slowest_requests(spans, limit)))
    console.print(_phases(time_by_phase(spans)))
    console.print(_load(load_by_expert(spans)))


def _print_tree(console: Console, spans: list[SpanRecord], request: str) -> None:
    trace_id = find_trace(spans, request)
    if trace_id is None:
        raise NotFoundError(f"no trace or request {request!r} among {len(spans)} spans")
    console.print(f"trace {trace_id}")
    for row in trace_tree(spans, trace_id):
        console.print(_tree_line(row), highlight=False)


def _tree_line(row: TreeRow) -> str:
    told = [
        f"{name.removeprefix('expertfleet.')}={row.span.attributes[name]}"
        for name in TREE_ATTRIBUTES
        if name in row.span.attributes
    ]
    name = row.span.name.removeprefix("expertfleet.")
    return (
        f"{row.offset_ms:10.2f} ms {'  ' * row.depth}{name} {row.span.duration_ms:.2f} ms "
        + " ".join(told)
    )


def _slowest(requests: list[RequestSummary]) -> Table:
    table = titled_table("slowest requests")
    for name in ("request", "began", "ms", "queue", "restore", "prefill", "decode", "in", "out"):
        table.add_column(name, justify="left" if name in ("request", "began") else "right")
    table.add_column("trace")
    for summary in requests:
        began = datetime.fromtimestamp(summary.start_ns / 1e9).strftime("%H:%M:%S")
        phases = (
            summary.phase_ms.get(name, 0.0) for name in ("queue", "restore", "prefill", "decode")
        )
        table.add_row(
            summary.request_id,
            began,
            f"{summary.duration_ms:.0f}",
            *(f"{phase:.0f}" for phase in phases),
            str(summary.num_input_tokens),
            str(summary.num_output_tokens),
            summary.trace_id[:12],
        )
    return table


def _phases(phases: list[PhaseTimes]) -> Table:
    table = titled_table("time by phase, ms")
    for name in ("phase", "count", "total", "mean", "p50", "p95", "max"):
        table.add_column(name, justify="left" if name == "phase" else "right")
    for phase in phases:
        times = (phase.total_ms, phase.mean_ms, phase.p50_ms, phase.p95_ms, phase.max_ms)
        table.add_row(phase.phase, str(phase.count), *(f"{value:.1f}" for value in times))
    return table


def _load(load: ExpertLoad) -> Table:
    table = titled_table(f"tokens by expert in {load.num_steps} sampled steps")
    experts = sorted({expert for _, expert in load.tokens})
    table.add_column("layer", justify="right")
    for expert in experts:
        table.add_column(str(expert), justify="right")
    for layer in sorted({layer for layer, _ in load.tokens}):
        counts = (str(load.tokens.get((layer, expert), 0)) for expert in experts)
        table.add_row(str(layer), *counts)
    return table
