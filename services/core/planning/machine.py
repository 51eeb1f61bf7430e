"""What the step model needs to know of the hardware, whether from data sheets or measured."""

from __future__ import annotations

from dataclasses import dataclass

from services.core.errors import ConfigurationError
from services.core.planning.gpus import Gpu
from services.core.planning.kernels import Kernel, Roofline


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Between shard and workers: bytes per second each way, and seconds from one to the other."""

    bandwidth: float
    delay_s: float

    def __post_init__(self) -> None:
        if self.bandwidth <= 0 or self.delay_s < 0:
            raise ConfigurationError(
                f"a network of {self.bandwidth:g} bytes/s with {self.delay_s:g} s of delay cannot "
                "be; give a rate above 0 and a delay of at least 0",
                setting="network",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class HostCosts:
    """What Python, gRPC and the engine cost around the kernels, in seconds.

    `layer_s` per dispatched layer call, `frame_s` per frame (one per worker) of it, `byte_s` per
    byte that a frame or its answer carries, copies included. `local_layer_s` per layer call of
    experts in process. `step_s` per step, `sequence_s` per sequence in it. Sampling: `sample_s`
    per step, `logit_s` per logit.
    """

    layer_s: float
    frame_s: float
    byte_s: float
    local_layer_s: float
    step_s: float
    sequence_s: float
    sample_s: float
    logit_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """`experts` is the kernel of one worker alone, `experts_together` of all of them at once where
    they share cores and memory (None: each has its own device). `attention` is the kernel of a
    layer's attention, norms and gate, `head` that of the output projection.

    `kv_bandwidth` and `attention_flops` are of reading the KV cache and of scores in prefill;
    `token_s` is per token and layer, beside the matrix products.
    """

    experts: Kernel
    experts_together: Kernel | None
    attention: Kernel
    head: Kernel
    kv_bandwidth: float
    attention_flops: float
    token_s: float
    host: HostCosts

    @property
    def shares_cores(self) -> bool:
        return self.experts_together is not None


GPU_HOST_COSTS = HostCosts(
    layer_s=155e-6,
    frame_s=115e-6,
    byte_s=0.7e-9,
    local_layer_s=60e-6,
    step_s=500e-6,
    sequence_s=15e-6,
    sample_s=150e-6,
    logit_s=2e-12,
)
"""Assumed beside a GPU where nothing was measured: grpcio's long-lived streams on loopback took
251 us for one worker's 8 KiB, 547 and 1159 for four and eight at once, 854 at 512 KiB."""
EXPERT_LAUNCH_S = 30e-6
"""Assumed: about six kernel launches without graphs."""
ATTENTION_LAUNCH_S = 80e-6
"""Assumed: about sixteen kernel launches without graphs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """Shares of the data sheet's peaks that kernels are assumed to reach."""

    bandwidth: float = 0.8
    compute: float = 0.6

    def __post_init__(self) -> None:
        for name, share in (("bandwidth", self.bandwidth), ("compute", self.compute)):
            if not 0 < share <= 1:
                raise ConfigurationError(
                    f"--{name}-efficiency {share:g} is no share of a peak; give 0 to 1",
                    setting=f"{name}_efficiency",
                )


def gpu_machine(
    gpu: Gpu, *, math: str = "bf16", efficiency: Efficiency, host: HostCosts = GPU_HOST_COSTS
) -> Machine:
    """A fleet in which every worker and every shard has a card of its own.

    `math` is the arithmetic of the experts' products: bf16, unless activations are quantised too.
    """
    bandwidth = gpu.bandwidth * efficiency.bandwidth
    flops = gpu.flops("bf16") * efficiency.compute

    def roofline(rate: float, launch_s: float) -> Roofline:
        return Roofline(bandwidth=bandwidth, flops=rate, launch_s=launch_s)

    return Machine(
        experts=roofline(gpu.flops(math) * efficiency.compute, EXPERT_LAUNCH_S),
        experts_together=None,
        attention=roofline(flops, ATTENTION_LAUNCH_S),
        head=roofline(flops, EXPERT_LAUNCH_S),
        kv_bandwidth=bandwidth,
        attention_flops=flops,
        token_s=0.0,
        host=host,
    )
