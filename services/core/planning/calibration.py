"""What `expertfleet plan --calibrate` measured on a machine, as a file and as a `Machine`.

The file is JSON: {"version": 1, "machine": text, "num_cores": n, "experts": {threads: kernel},
"attention": {threads: kernel}, "head": {threads: kernel}, "kv_bandwidth": bytes/s,
"attention_flops": flop/s, "costs": {name of `HostCosts`: seconds}}; a kernel is {"rows": [...],
"fixed_s": [...], "s_per_byte": [...]} as `MeasuredKernel`. docs/planning.md says how each is had.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from services.core.errors import ConfigurationError
from services.core.model_config import ModelConfig
from services.core.placement import plan_placement, worker_threads
from services.core.planning.gpus import Gpu
from services.core.planning.kernels import MeasuredKernel
from services.core.planning.machine import HostCosts, Machine, Network
from services.core.planning.step_model import Layout

VERSION = 1
MEASURED = "measured"
"""In place of a card's name: a machine like the calibrated one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """`experts`, `attention` and `head` are by the number of threads that computed."""

    machine: str
    num_cores: int
    experts: Mapping[int, MeasuredKernel]
    attention: Mapping[int, MeasuredKernel]
    head: Mapping[int, MeasuredKernel]
    kv_bandwidth: float
    attention_flops: float
    costs: HostCosts

    def machine_for(self, num_workers: int) -> Machine:
        """This machine with so many workers, with threads as the launcher gives them, beside a
        shard that has all cores while they wait for it; 0: experts in the shard's process."""
        return Machine(
            experts=_at(self.experts, worker_threads(self.num_cores, num_workers)),
            experts_together=_at(self.experts, self.num_cores),
            attention=_at(self.attention, self.num_cores),
            head=_at(self.head, self.num_cores),
            kv_bandwidth=self.kv_bandwidth,
            attention_flops=self.attention_flops,
            token_s=0.0,
            host=self.costs,
        )

    def machine_alone(self) -> Machine:
        """A fleet in which every worker and every shard has such a machine of its own."""
        whole = self.machine_for(0)
        return replace(whole, experts_together=None)

    def as_card(self, *, memory_bytes: float, price_per_hour: float) -> Gpu:
        """Its rates as those of a card: of reading experts at one row, and of the arithmetic that
        the largest measured number of rows shows."""
        kernel = _at(self.experts, self.num_cores)
        flops = kernel.rows[-1] / kernel.s_per_byte[-1]  # two per weight of two bytes
        return Gpu(
            name=MEASURED,
            memory_bytes=memory_bytes,
            bandwidth=1.0 / kernel.s_per_byte[0],
            bf16_flops=flops,
            fp8_flops=0.0,
            int8_flops=0.0,
            price_per_hour=price_per_hour,
        )

    def to_json(self) -> str:
        return json.dumps({"version": VERSION} | asdict(self), indent=1) + "\n"


def worker_layout(config: ModelConfig, num_workers: int) -> Layout:
    """As many workers on one machine, placed as `expertfleet up` does; 0: experts in process.

    At most one worker per expert.
    """
    if num_workers == 0:
        return Layout(groups=())
    placement = plan_placement(config.num_hidden_layers, config.num_local_experts, num_workers)
    return Layout(groups=tuple(slots.experts for slots in placement))


def loopback(delay_s: float = 0.0) -> Network:
    """What loopback costs per byte is in the measured cost of frames."""
    return Network(bandwidth=1e15, delay_s=delay_s)


def thread_counts(num_cores: int) -> list[int]:
    """Numbers of threads that kernels are measured with: powers of two and all cores."""
    powers = {1 << bit for bit in range(num_cores.bit_length()) if 1 << bit <= num_cores}
    return sorted(powers | {num_cores})


def read_calibration(path: Path) -> Calibration:
    """Raises `ConfigurationError` where the file is not one that `--calibrate` wrote."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(loaded, dict) or loaded.get("version") != VERSION:
            raise ValueError(f"it is not of version {VERSION}")
        return _calibration(loaded)
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be read ({error.strerror}); write it with `expertfleet plan "
            "--calibrate`",
            setting="hardware",
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{path} is no calibration ({error}); write it anew with `expertfleet plan "
            "--calibrate`",
            setting="hardware",
        ) from error


def _calibration(loaded: dict[str, Any]) -> Calibration:
    costs = loaded["costs"]
    return Calibration(
        machine=str(loaded["machine"]),
        num_cores=_positive(loaded, "num_cores", int),
        experts=_kernels(loaded, "experts"),
        attention=_kernels(loaded, "attention"),
        head=_kernels(loaded, "head"),
        kv_bandwidth=_positive(loaded, "kv_bandwidth", float),
        attention_flops=_positive(loaded, "attention_flops", float),
        costs=HostCosts(**{field.name: float(costs[field.name]) for field in fields(HostCosts)}),
    )


def _kernels(loaded: dict[str, Any], name: str) -> dict[int, MeasuredKernel]:
    kernels = {}
    for threads, kernel in loaded[name].items():
        columns = {
            column: tuple(float(value) for value in kernel[column])
            for column in ("rows", "fixed_s", "s_per_byte")
        }
        if len({len(values) for values in columns.values()}) != 1 or not columns["rows"]:
            raise ValueError(f"{name} of {threads} threads has columns of different lengths")
        kernels[int(threads)] = MeasuredKernel(**columns)
    if not kernels:
        raise ValueError(f"{name} is empty")
    return kernels


def _positive(loaded: dict[str, Any], name: str, convert: type[Any]) -> Any:
    value = convert(loaded[name])
    if not value > 0:
        raise ValueError(f"{name} is {value}")
    return value


def _at(kernels: Mapping[int, MeasuredKernel], threads: int) -> MeasuredKernel:
    """Of the largest measured number of threads that is not above `threads`."""
    fitting = [count for count in kernels if count <= threads]
    return kernels[max(fitting) if fitting else min(kernels)]
