"""`expertfleet bench`: load on a running gateway, and what its users would have seen."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from services.cli.gateway_client import DEFAULT_URL, GatewayClient
from services.cli.load.client import LoadClient, RequestRecord
from services.cli.load.lengths import Lengths
from services.cli.load.report import PERCENTILES, LatencyBound, LoadReport, summarise
from services.cli.load.run import run_workload
from services.cli.load.workload import WorkloadShape, draw_workload
from services.cli.tables import titled_table
from services.core.errors import UnavailableError

_REQUEST_TIMEOUT_S = 600.0


def bench(
    url: Annotated[str, typer.Option(help="the gateway")] = DEFAULT_URL,
    api_key: Annotated[str | None, typer.Option(help="bearer token")] = None,
    requests: Annotated[int, typer.Option(min=1, help="conversations to hold")] = 64,
    rate: Annotated[
        float | None, typer.Option(min=0.001, help="conversations/s, Poisson; default: no wait")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="conversations at once; default: 8 without --rate")
    ] = None,
    prompt_tokens: Annotated[str, typer.Option(help="128, 64-256 or lognormal:100:0.8")] = "128",
    output_tokens: Annotated[str, typer.Option(help="as --prompt-tokens")] = "64",
    turns: Annotated[int, typer.Option(min=1, help="turns of a session")] = 1,
    think_s: Annotated[float, typer.Option(min=0, help="seconds between turns")] = 0.0,
    warmup: Annotated[int, typer.Option(min=0, help="conversations before, not counted")] = 4,
    ttft_ms: Annotated[float | None, typer.Option(min=0, help="bound for goodput")] = None,
    tpot_ms: Annotated[float | None, typer.Option(min=0, help="bound for goodput")] = None,
    vocab_size: Annotated[int, typer.Option(min=16, help="prompts draw token ids below")] = 1000,
    seed: Annotated[int, typer.Option(help="of prompts, lengths and arrivals")] = 0,
    out: Annotated[Path | None, typer.Option(help="write the figures there as JSON")] = None,
) -> None:
    """Send a workload of random prompts and print rates, latencies and goodput."""
    shape = WorkloadShape(
        num_conversations=requests,
        rate=rate,
        prompt_tokens=Lengths.parse(prompt_tokens),
        output_tokens=Lengths.parse(output_tokens),
        num_turns=turns,
        think_s=think_s,
        vocab_size=vocab_size,
        seed=seed,
    )
    if rate is None and concurrency is None:
        concurrency = 8
    model = GatewayClient(url, api_key).model()
    records = asyncio.run(_run(url, model, api_key, shape, warmup, concurrency))
    bound = LatencyBound(
        ttft_s=None if ttft_ms is None else ttft_ms / 1e3,
        tpot_s=None if tpot_ms is None else tpot_ms / 1e3,
    )
    report = summarise(records, bound)
    if out is not None:
        settings = {"url": url, "model": model, "shape": _describe(shape, concurrency)}
        out.write_text(json.dumps(settings | report.as_json(), indent=1) + "\n")
    _print(report, f"{model}: {_describe(shape, concurrency)}", bound)
    if report.num_failed == report.num_requests:
        raise UnavailableError(f"every request failed: {next(iter(report.errors))}")


async def _run(
    url: str,
    model: str,
    api_key: str | None,
    shape: WorkloadShape,
    warmup: int,
    concurrency: int | None,
) -> list[RequestRecord]:
    client = LoadClient(url, model=model, api_key=api_key, timeout_s=_REQUEST_TIMEOUT_S)
    try:
        if warmup:
            first = replace(shape, num_conversations=warmup, rate=None, seed=shape.seed ^ 1 << 40)
            await run_workload(client, draw_workload(first), max_concurrency=concurrency)
        return await run_workload(client, draw_workload(shape), max_concurrency=concurrency)
    finally:
        await client.close()


def _describe(shape: WorkloadShape, concurrency: int | None) -> str:
    arrivals = f"{shape.rate:g}/s Poisson" if shape.rate else "closed loop"
    at_once = f", at most {concurrency} at once" if concurrency else ""
    turns = f", {shape.num_turns} turns" if shape.num_turns > 1 else ""
    return f"{shape.num_conversations} conversations{turns}, {arrivals}{at_once}"


def _print(report: LoadReport, title: str, bound: LatencyBound) -> None:
    console = Console(file=sys.stdout)
    table = titled_table(title)
    columns = ["mean", *(f"p{percent}" for percent in PERCENTILES), "max"]
    for name in ("ms", *columns):
        table.add_column(name, justify="left" if name == "ms" else "right")
    for name, figures in report.latencies_ms.items():
        row = [f"{figures[column]:.1f}" if figures else "-" for column in columns]
        table.add_row(name.upper(), *row)
    console.print(table)
    console.print(
        f"{report.num_requests} requests ({report.num_failed} failed) in "
        f"{report.duration_s:.1f} s: {report.requests_per_s:.2f} requests/s, "
        f"{report.output_tokens_per_s:.0f} output tokens/s",
        highlight=False,
    )
    if bound != LatencyBound():
        console.print(
            f"goodput {report.goodput_per_s:.2f} requests/s "
            f"({report.good_share:.0%} within the bounds)",
            highlight=False,
        )
    if len(report.ttft_by_turn_ms) > 1:
        by_turn = ", ".join(f"{value:.0f}" for value in report.ttft_by_turn_ms)
        console.print(f"median TTFT by turn, ms: {by_turn}", highlight=False)
    for error, count in report.errors.items():
        console.print(f"{count} x {error}", highlight=False, markup=False)
