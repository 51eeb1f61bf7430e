"""`expertfleet restart` and `expertfleet status`: commands to a running `expertfleet up`."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from services.cli.control import ask
from services.cli.rolling_restart import parse_what
from services.cli.state_folder import RunningInstance, default_state_dir
from services.cli.tables import titled_table
from services.core.settings import load_settings

StateDir = Annotated[
    Path | None, typer.Option(help="state folder of the running product; default: up's default")
]


def restart(
    what: Annotated[str, typer.Argument(help="workers, shards, gateway or all")],
    model: Annotated[
        str | None, typer.Option(help="with all: another checkpoint of the same shape")
    ] = None,
    state_dir: StateDir = None,
) -> None:
    """Restart the processes of a running product one by one, while it serves."""
    request = {"command": "restart", "what": parse_what(what)}
    if model is not None:
        request["model"] = str(Path(model).resolve()) if Path(model).exists() else model
    asyncio.run(ask(_instance(state_dir).control_socket, request, on_progress=_print))


def status(state_dir: StateDir = None) -> None:
    """Show the processes of a running product."""
    told = asyncio.run(ask(_instance(state_dir).control_socket, {"command": "status"}))
    _show(told)


def _instance(state_dir: Path | None) -> RunningInstance:
    return RunningInstance.find(state_dir or load_settings().state_dir or default_state_dir())


def _show(told: dict[str, Any]) -> None:
    busy = ", restarting" if told["is_restarting"] else ""
    table = titled_table(f"{told['model']} at {told['url']}{busy}")
    for column in ("process", "pid", "state", "restarts", "holds"):
        table.add_column(column, justify="right" if column in ("pid", "restarts") else "left")
    for process in told["processes"]:
        table.add_row(*(str(process[key]) for key in ("name", "pid", "state", "restarts", "holds")))
    Console().print(table)


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
