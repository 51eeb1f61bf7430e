"""The `expertfleet` command: parses arguments and hands over to one module per subcommand."""

from __future__ import annotations

import sys

import typer

from services.cli import (
    autoscale,
    bench,
    chat,
    expert,
    experts,
    plan,
    quantize,
    restart,
    traces,
    up,
)
from services.core.errors import EXIT_BAD_INPUT, ExpertfleetError

app = typer.Typer(
    name="expertfleet",
    help="Serve Mixtral-family models with every expert as its own service.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("up")(up.up)
app.command("restart")(restart.restart)
app.command("status")(restart.status)
app.command("expert")(expert.expert)
app.command("autoscale")(autoscale.autoscale)
app.command("chat")(chat.chat)
app.command("complete")(chat.complete)
app.command("experts")(experts.experts)
app.command("plan")(plan.plan)
app.command("traces")(traces.traces)
app.command("quantize")(quantize.quantize)
app.command("bench")(bench.bench)


def main() -> None:
    """Run the command line; our own errors become one line on stderr and exit status 2."""
    try:
        app()
    except ExpertfleetError as error:
        sys.stderr.write(f"expertfleet: {error.message}\n")
        sys.exit(EXIT_BAD_INPUT)
