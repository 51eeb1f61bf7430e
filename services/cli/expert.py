"""`expertfleet expert`: run one expert worker in the foreground."""

from __future__ import annotations

from typing import Annotated

import typer

from services.core.settings import load_settings


def expert(
    model: Annotated[str, typer.Option(help="folder of a checkpoint, or a hub id")],
    experts: Annotated[str | None, typer.Option(help="indices, e.g. 0,1 or 4-7")] = None,
    layers: Annotated[str | None, typer.Option(help="layers, e.g. 0-15; default: all")] = None,
    slots: Annotated[
        str | None, typer.Option(help="instead: layers:experts;..., e.g. 0-3:0,1;5:7")
    ] = None,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="gRPC port; 0 picks a free one")] = 0,
    metrics_port: Annotated[int, typer.Option(help="Prometheus port; 0 picks one")] = 0,
    worker_id: Annotated[str | None, typer.Option(help="name in the registry")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, bfloat16, float16, float32")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:N or auto")] = None,
    expert_weights: Annotated[str | None, typer.Option(help="auto, int8 or int4")] = None,
) -> None:
    """Run one expert worker: load its experts' tensors, register, compute until SIGTERM."""
    from expert_service.main import run_worker

    settings = load_settings(model=model, dtype=dtype, device=device, expert_weights=expert_weights)
    raise typer.Exit(
        run_worker(
            settings,
            experts=experts,
            layers=layers,
            slots=slots,
            host=host,
            port=port,
            metrics_port=metrics_port,
            worker_id=worker_id,
        )
    )
