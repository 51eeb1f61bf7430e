"""`expertfleet up`: everything on this machine, supervised, until Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer

from services.autoscaler.options import PolicyOptions
from services.cli.fleet import Fleet, FleetPlan
from services.cli.hardware import Hardware
from services.cli.state_folder import StateFolder, default_state_dir
from services.core.checkpoints.hub import find_model
from services.core.errors import ConfigurationError
from services.core.listening_socket import open_listener
from services.core.logging_setup import configure_logging
from services.core.model_config import ModelConfig, load_model_config
from services.core.settings import Settings, load_settings

DEFAULT_WORKERS = 4
DEFAULT_STORE_BYTES = 1 << 30


def up(
    model: Annotated[str | None, typer.Option(help="folder of a checkpoint, or a hub id")] = None,
    workers: Annotated[
        int, typer.Option(min=1, help="expert workers that together hold every expert")
    ] = DEFAULT_WORKERS,
    replicas: Annotated[
        int, typer.Option(min=1, help="times that every expert is held: so many times --workers")
    ] = 1,
    shards: Annotated[str, typer.Option(help="attention shards: 2, or 1-4 to scale")] = "1",
    host: Annotated[str | None, typer.Option(help="address of the gateway")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="port of the gateway")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, bfloat16, float16, float32")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N")] = None,
    expert_weights: Annotated[str | None, typer.Option(help="auto, int8 or int4")] = None,
    shard_weights: Annotated[str | None, typer.Option(help="auto, int8 or int4")] = None,
    reproducible: Annotated[
        bool | None,
        typer.Option(help="refuse to start where answers could depend on other requests"),
    ] = None,
    state_dir: Annotated[Path | None, typer.Option(help="logs, traces, sockets")] = None,
    store_bytes: Annotated[
        int, typer.Option(min=1 << 20, help="memory of the embedded session store")
    ] = DEFAULT_STORE_BYTES,
    autoscale: Annotated[
        bool, typer.Option("--autoscale", help="give hot experts more replicas, in memory to spare")
    ] = False,
    max_workers: Annotated[
        int | None, typer.Option(min=1, help="with --autoscale: start workers up to so many")
    ] = None,
    shadow_copies: Annotated[
        bool, typer.Option(help="with --autoscale: second copies of experts in spare memory")
    ] = True,
    idle_after_s: Annotated[
        float, typer.Option(min=0, help="with --autoscale: until idle room is given back")
    ] = 30.0,
    busy: Annotated[
        float,
        typer.Option(min=0.05, max=1, help="with --max-workers: how saturated until one is added"),
    ] = 0.7,
    spare: Annotated[
        bool, typer.Option(help="keep a process ready that becomes the next worker")
    ] = True,
    no_ray: Annotated[bool, typer.Option("--no-ray", help="gateway and engine together")] = False,
    no_workers: Annotated[
        bool, typer.Option("--no-workers", help="experts inside the shard's process")
    ] = False,
    external_workers: Annotated[
        bool,
        typer.Option(
            "--external-workers",
            help="start none: they are elsewhere, and known to the store of EXPERTFLEET_REDIS_URL",
        ),
    ] = False,
) -> None:
    """Start store, expert workers, shards and gateway; serve until Ctrl-C."""
    settings = load_settings(
        model=model,
        host=host,
        port=port,
        dtype=dtype,
        device=device,
        expert_weights=expert_weights,
        shard_weights=shard_weights,
        reproducible=reproducible,
    )
    config = load_model_config(find_model(settings.model).folder)
    min_shards, max_shards = _parse_shards(shards)
    if no_ray and max_shards > 1:
        raise ConfigurationError("--no-ray has one shard; leave --shards out", setting="shards")
    if external_workers and (no_workers or autoscale or settings.redis_url is None):
        raise ConfigurationError(
            "--external-workers needs EXPERTFLEET_REDIS_URL, the store that the workers are known "
            "to, and excludes --no-workers and --autoscale (`expertfleet autoscale` runs apart)",
            setting="redis_url",
        )
    num_workers = 0 if no_workers or external_workers or not config.is_moe else workers
    plan = FleetPlan(
        num_workers=num_workers,
        min_shards=min_shards,
        max_shards=max_shards,
        use_ray=not no_ray,
        store_bytes=store_bytes,
        replicas=replicas,
        autoscaling=_autoscaling(
            autoscale,
            num_workers * replicas,
            max_workers,
            shadow_copies=shadow_copies,
            idle_after_s=idle_after_s,
            busy=busy,
        ),
        external_workers=external_workers,
        keeps_spare=spare,
    )
    listener = open_listener(settings.host, settings.port, reuse_port=False)
    folder = StateFolder(state_dir or settings.state_dir or default_state_dir())
    try:
        asyncio.run(_run(settings, plan, config, folder, listener))
    finally:
        folder.close()


async def _run(
    settings: Settings,
    plan: FleetPlan,
    config: ModelConfig,
    folder: StateFolder,
    listener: socket.socket,
) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    if plan.autoscaling is not None:
        configure_logging(
            settings.log_level,
            service="autoscaler",
            instance=str(os.getpid()),
            file=folder.log_file("autoscaler"),
        )
    fleet = Fleet(settings, plan, config, folder, Hardware.detect(), listener, _say)
    started = time.monotonic()
    _say(f"{_describe(plan, config)}; logs in {folder.path / 'logs'}")
    try:
        if await _unless(stop, fleet.start()):
            _say(f"ready in {time.monotonic() - started:.1f} s: {fleet.url}")
            sys.stdout.write(_first_request(fleet.url))
            sys.stdout.flush()
            await _unless(stop, fleet.watch())
    finally:
        _say("stopping")
        await fleet.stop()
        _say("stopped")


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Run `work` until it ends (True) or `stop` is set (False); its errors are raised."""
    task = asyncio.create_task(work)
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait((task, stopped), return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if task.done():
        await task
        return True
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    return False


def _parse_shards(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)(?:-([1-9]\d*))?", text)
    low = int(match[1]) if match else 0
    high = int(match[2]) if match and match[2] else low
    if match is None or high < low:
        raise ConfigurationError(
            f"--shards {text!r} is neither a count such as 2 nor a range such as 1-4",
            setting="shards",
        )
    return low, high


def _autoscaling(
    wanted: bool,
    num_workers: int,
    max_workers: int | None,
    *,
    shadow_copies: bool = True,
    idle_after_s: float = 30.0,
    busy: float = 0.7,
) -> PolicyOptions | None:
    if not wanted and max_workers is None:
        return None
    if not wanted or num_workers == 0:
        raise ConfigurationError(
            "--max-workers and --autoscale belong together, and need expert workers",
            setting="autoscale",
        )
    return PolicyOptions(
        min_workers=num_workers,
        max_workers=max_workers or num_workers,
        scale_workers=max_workers is not None,
        shadow_copies=shadow_copies,
        idle_after_s=idle_after_s,
        scale_out_utilization=busy,
    )


def _describe(plan: FleetPlan, config: ModelConfig) -> str:
    model = f"{config.architecture}, {config.num_hidden_layers} layers"
    if config.is_moe:
        model += f" x {config.num_local_experts} experts"
    experts = "in process" if plan.in_process_experts else f"in {plan.num_processes} workers"
    if plan.external_workers:
        experts = "in workers elsewhere"
    shards = str(plan.min_shards)
    if plan.max_shards > plan.min_shards:
        shards += f" to {plan.max_shards}"
    front = "Ray Serve" if plan.use_ray else "one process"
    return f"{model}; experts {experts}; {shards} attention shard(s) in {front}"


def _first_request(url: str) -> str:
    return (
        "\nTry:\n"
        f"  curl -N {url}/v1/completions -H 'content-type: application/json' \\\n"
        """    -d '{"prompt": "def read_lines(path):\\n", "max_tokens": 64, "stream": true}'\n"""
        "\nCtrl-C ends everything.\n"
    )


def _say(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')}  {text}\n")
    sys.stderr.flush()
