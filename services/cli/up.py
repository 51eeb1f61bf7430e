"""`expertfleet up`: everything on this machine, supervised, until Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import socket
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer

from services.cli.fleet import Fleet, FleetPlan
from services.cli.hardware import Hardware
from services.cli.state_folder import StateFolder, default_state_dir
from services.core.checkpoints.hub import find_model
from services.core.errors import ConfigurationError
from services.core.model_config import ModelConfig, load_model_config
from services.core.settings import Settings, load_settings

DEFAULT_WORKERS = 4
DEFAULT_STORE_BYTES = 1 << 30


def up(
    model: Annotated[str | None, typer.Option(help="folder of a checkpoint, or a hub id")] = None,
    workers: Annotated[int, typer.Option(min=1, help="expert workers")] = DEFAULT_WORKERS,
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
    no_ray: Annotated[bool, typer.Option("--no-ray", help="gateway and engine together")] = False,
    no_workers: Annotated[
        bool, typer.Option("--no-workers", help="experts inside the shard's process")
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
    plan = FleetPlan(
        num_workers=0 if no_workers or not config.is_moe else workers,
        min_shards=min_shards,
        max_shards=max_shards,
        use_ray=not no_ray,
        store_bytes=store_bytes,
    )
    _refuse_busy_port(settings)
    folder = StateFolder(state_dir or settings.state_dir or default_state_dir())
    try:
        asyncio.run(_run(settings, plan, config, folder))
    finally:
        folder.close()


async def _run(
    settings: Settings, plan: FleetPlan, config: ModelConfig, folder: StateFolder
) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    fleet = Fleet(settings, plan, config, folder, Hardware.detect(), _say)
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


def _refuse_busy_port(settings: Settings) -> None:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            raise ConfigurationError(
                f"{settings.host}:{settings.port} cannot be listened on ({error.strerror}); "
                "choose another with --host and --port",
                setting="port",
            ) from error


def _describe(plan: FleetPlan, config: ModelConfig) -> str:
    model = f"{config.architecture}, {config.num_hidden_layers} layers"
    if config.is_moe:
        model += f" x {config.num_local_experts} experts"
    experts = "in process" if plan.in_process_experts else f"in {plan.num_workers} workers"
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
