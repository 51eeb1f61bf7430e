"""`expertfleet plan`: what a fleet for a model would need, cost and reach, before it is bought."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from services.cli.plan_report import plan_json, print_plans
from services.cli.quantities import parse_bytes, parse_duration_s, parse_network, parse_tokens
from services.cli.state_folder import default_state_dir
from services.core.errors import ConfigurationError
from services.core.model_config import ModelConfig, load_model_config
from services.core.planning.calibration import MEASURED, Calibration, read_calibration
from services.core.planning.fleet import CardCosts, FleetOptions, FleetPlan, FleetPlanner
from services.core.planning.gpus import GPUS, MATH_TYPES, Gpu, find_gpu
from services.core.planning.machine import (
    GPU_HOST_COSTS,
    Efficiency,
    Machine,
    Network,
    gpu_machine,
)
from services.core.planning.model_sizes import PUBLISHED_MODELS, ModelSizes
from services.core.planning.weight_formats import WEIGHT_FORMATS, weight_format
from services.core.planning.workload import Workload
from services.core.settings import load_settings


def plan(
    model: Annotated[
        str, typer.Option(help=f"{', '.join(PUBLISHED_MODELS)}, or a checkpoint's folder")
    ] = "mixtral-8x22b",
    gpu: Annotated[
        str, typer.Option(help=f"{', '.join(GPUS)}, custom, or measured: what --hardware has")
    ] = "l4",
    network: Annotated[str, typer.Option(help="10g, 25g, 100g or 3gb/s, each way")] = "25g",
    network_delay: Annotated[str, typer.Option(help="one way, e.g. 50us")] = "50us",
    context: Annotated[str, typer.Option(help="tokens of KV cache a stream holds")] = "8k",
    users: Annotated[int, typer.Option(min=1, help="streams decoding at any time")] = 200,
    prompt_tokens: Annotated[
        str | None, typer.Option(help="uncached prompt tokens of a request; default 1k or fewer")
    ] = None,
    output_tokens: Annotated[
        str | None, typer.Option(help="tokens a request generates; default 256 or fewer")
    ] = None,
    precision: Annotated[
        str, typer.Option(help=f"of experts, one or more of {','.join(WEIGHT_FORMATS)}")
    ] = ",".join(WEIGHT_FORMATS),
    tpot_target: Annotated[
        str | None, typer.Option(help="bound on time per token, e.g. 150ms; default: cheapest")
    ] = None,
    skew: Annotated[
        float | None, typer.Option(help="share of tokens on the hottest expert; default: even")
    ] = None,
    experts_per_pod: Annotated[int, typer.Option(min=1, help="expert indices on one card")] = 1,
    micro_batches: Annotated[
        int | None, typer.Option(min=1, max=8, help="in flight per shard; default: the best of 1-3")
    ] = None,
    no_merge: Annotated[
        bool, typer.Option("--no-merge", help="workers never merge frames of several shards")
    ] = False,
    math: Annotated[
        str, typer.Option(help=f"arithmetic of experts: {', '.join(MATH_TYPES)}")
    ] = "bf16",
    gpu_memory: Annotated[str | None, typer.Option(help="of a card, e.g. 24gb")] = None,
    gpu_bandwidth: Annotated[str | None, typer.Option(help="of its memory, e.g. 300gb/s")] = None,
    gpu_tflops: Annotated[float | None, typer.Option(help="its dense bf16 peak")] = None,
    gpu_price: Annotated[
        float | None, typer.Option(help="dollars per card and hour; built-in prices are assumed")
    ] = None,
    bandwidth_efficiency: Annotated[
        float, typer.Option(help="share of the peak that kernels reach")
    ] = Efficiency().bandwidth,
    compute_efficiency: Annotated[
        float, typer.Option(help="share of the peak that kernels reach")
    ] = Efficiency().compute,
    hardware: Annotated[
        Path | None, typer.Option(help="a calibration; its host costs replace the built-in ones")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="measure this machine (minutes), write --hardware")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Predict memory, pods, speed and cost of serving a model on cards over a network."""
    if calibrate:
        _calibrate(hardware)
        return
    measured = None if hardware is None else read_calibration(hardware)
    changes = {
        "memory_bytes": None if gpu_memory is None else parse_bytes(gpu_memory, "--gpu-memory"),
        "bandwidth": (
            None if gpu_bandwidth is None else parse_network(gpu_bandwidth, "--gpu-bandwidth")
        ),
        "bf16_flops": None if gpu_tflops is None else gpu_tflops * 1e12,
        "price_per_hour": gpu_price,
    }
    efficiency = Efficiency(bandwidth=bandwidth_efficiency, compute=compute_efficiency)
    if gpu == MEASURED:
        card, machine = _measured_card(measured, changes)
    else:
        card = find_gpu(gpu, **changes)
        costs = GPU_HOST_COSTS if measured is None else measured.costs
        machine = gpu_machine(card, math=math, efficiency=efficiency, host=costs)
    _check_card(card)
    config = find_model_config(model)
    num_context = parse_tokens(context, "--context")
    num_output = _tokens(output_tokens, "--output-tokens", min(256, max(1, num_context // 4)))
    num_prompt = _tokens(prompt_tokens, "--prompt-tokens", min(1024, num_context - num_output))
    workload = Workload(
        users=users,
        context=num_context,
        prompt_tokens=num_prompt,
        output_tokens=num_output,
        hot_share=skew,
        tpot_target_s=(
            None if tpot_target is None else parse_duration_s(tpot_target, "--tpot-target")
        ),
    )
    workload.check(config)
    if experts_per_pod > config.num_local_experts:
        raise ConfigurationError(
            f"--experts-per-pod {experts_per_pod} is more than the model's "
            f"{config.num_local_experts} experts",
            setting="experts_per_pod",
        )
    wire = Network(
        bandwidth=parse_network(network, "--network"),
        delay_s=parse_duration_s(network_delay, "--network-delay"),
    )
    options = FleetOptions(
        experts_per_pod=experts_per_pod,
        num_micro_batches=micro_batches,
        merge_frames=not no_merge,
    )
    plans: list[FleetPlan] = []
    for name in precision.split(","):
        sizes = ModelSizes(config=config, weights=weight_format(name))
        price = CardCosts(memory_bytes=card.memory_bytes, price_per_hour=card.price_per_hour)
        plans.append(FleetPlanner(sizes, machine, wire, price, workload, options).plan())
    if as_json:
        typer.echo(json.dumps(plan_json(model, config, card, wire, workload, plans), indent=2))
        return
    print_plans(Console(), model, config, card, wire, workload, plans)


def find_model_config(model: str) -> ModelConfig:
    """A published model by name, else what lies in a checkpoint's folder or at its config.json.

    Raises `ConfigurationError` with the choices, `CheckpointError` or `UnsupportedModelError`.
    """
    if model in PUBLISHED_MODELS:
        return PUBLISHED_MODELS[model]
    path = Path(model).expanduser()
    if path.is_dir():
        return load_model_config(path)
    if path.is_file() and path.name in ("config.json", "params.json"):
        return load_model_config(path.parent)
    raise ConfigurationError(
        f"unknown model {model!r}; choose from {', '.join(PUBLISHED_MODELS)}, or give the folder "
        "of a checkpoint or its config.json",
        setting="model",
    )


def _measured_card(
    measured: Calibration | None, changes: dict[str, float | None]
) -> tuple[Gpu, Machine]:
    """Machines like the calibrated one in place of cards."""
    memory_bytes, price = changes["memory_bytes"], changes["price_per_hour"]
    if measured is None or memory_bytes is None or price is None:
        raise ConfigurationError(
            f"--gpu {MEASURED} also needs --hardware, --gpu-memory and --gpu-price", setting="gpu"
        )
    card = measured.as_card(memory_bytes=memory_bytes, price_per_hour=price)
    return card, measured.machine_alone()


def _tokens(given: str | None, option: str, default: int) -> int:
    return default if given is None else parse_tokens(given, option)


def _check_card(card: Gpu) -> None:
    for name in ("memory_bytes", "bandwidth", "bf16_flops"):
        if getattr(card, name) <= 0:
            raise ConfigurationError(f"a GPU's {name} must be above 0", setting="gpu")
    if card.price_per_hour < 0:
        raise ConfigurationError("--gpu-price must be at least 0", setting="gpu_price")


def _calibrate(out: Path | None) -> None:
    from services.cli.calibration.run import calibrate

    state_dir = load_settings().state_dir or default_state_dir()
    path = out or state_dir / "calibration.json"
    _check_writable(path)
    calibration = calibrate(
        num_cores=len(os.sched_getaffinity(0)), say=lambda text: typer.echo(text, err=True)
    )
    path.write_text(calibration.to_json(), encoding="utf-8")
    typer.echo(f"written to {path}; use it with --hardware {path}")


def _check_writable(path: Path) -> None:
    """Before minutes of measuring, not after them."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        with path.open("ab"):
            pass
        if is_new:
            path.unlink()
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be written ({error.strerror}); name another file with --hardware",
            setting="hardware",
        ) from error
