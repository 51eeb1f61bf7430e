"""`expertfleet experts`: who works how hard, live in the terminal."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from services.cli.chat import ApiKey, Url
from services.cli.gateway_client import DEFAULT_URL, GatewayClient
from services.cli.tables import titled_table

SHADES = "▁▂▃▄▅▆▇█"


def experts(
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    interval_s: Annotated[float, typer.Option(min=0.2, help="seconds between readings")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="print one reading and end")] = False,
) -> None:
    """Show workers, shards, and the tokens of every expert in every layer."""
    client = GatewayClient(url, api_key)
    console = Console()
    if once:
        console.print(_screen(client.get("/v1/experts")))
        return
    with Live(_screen(client.get("/v1/experts")), console=console, screen=True) as live:
        while True:
            time.sleep(interval_s)
            live.update(_screen(client.get("/v1/experts")))


def _screen(fleet: dict[str, Any]) -> Group:
    title = f"{fleet['model']}: {fleet['num_layers']} layers x {fleet['num_experts']} experts"
    if fleet["missing"]:
        title += f"; {len(fleet['missing'])} slots have no worker"
    return Group(Text(title), _load_table(fleet), _worker_table(fleet), _shard_table(fleet))


def _load_table(fleet: dict[str, Any]) -> Table:
    """One row a layer, one column an expert: share of tokens, hotter ones marked."""
    table = titled_table("share of tokens by expert")
    table.add_column("layer", justify="right")
    for expert in range(fleet["num_experts"]):
        table.add_column(str(expert), justify="right")
    table.add_column("max/avg", justify="right")
    table.add_column("tok/s", justify="right")
    for layer, load in enumerate(fleet["load"]["layers"]):
        hottest = max(load["share"], default=0.0) or 1.0
        cells = [_share(share, hottest, fleet["num_experts"]) for share in load["share"]]
        imbalance = f"{load['imbalance']:.2f}" if load["imbalance"] is not None else "-"
        rates = load["tokens_per_second"]
        rate = f"{sum(rates):.0f}" if rates is not None else "-"
        table.add_row(str(layer), *cells, imbalance, rate)
    return table


def _share(share: float, hottest: float, num_experts: int) -> Text:
    shade = SHADES[min(len(SHADES) - 1, int(share / hottest * len(SHADES)))]
    style = "bold red" if share * num_experts > 1.5 else ""
    return Text(f"{share:.0%} {shade}", style=style)


def _worker_table(fleet: dict[str, Any]) -> Table:
    table = titled_table("expert workers")
    for name in ("worker", "state", "device", "experts", "MiB", "tokens", "queue ms", "compute ms"):
        table.add_column(name, justify="left" if name in ("worker", "state") else "right")
    for worker in fleet["workers"]:
        table.add_row(
            worker["worker_id"],
            worker["state"],
            worker["device"],
            ",".join(map(str, worker["experts"])),
            f"{worker['weight_bytes'] / 2**20:.0f}",
            str(worker["tokens"]),
            f"{worker['queue_ms']:.2f}",
            f"{worker['compute_ms']:.2f}",
        )
    return table


def _shard_table(fleet: dict[str, Any]) -> Table:
    table = titled_table("attention shards")
    for name in ("shard", "running", "waiting", "KV use", "generated", "prefilled"):
        table.add_column(name, justify="left" if name == "shard" else "right")
    for shard in fleet["shards"]:
        table.add_row(
            shard["shard_id"],
            str(shard["num_running"]),
            str(shard["num_waiting"]),
            f"{shard['kv_blocks_used'] / max(1, shard['kv_blocks_total']):.0%}",
            str(shard["num_generated_tokens"]),
            str(shard["num_prefilled_tokens"]),
        )
    return table
