"""What fits on a card: expert pods cut by layer range, attention shards with their KV pool."""

from __future__ import annotations

from dataclasses import dataclass

from services.core.planning.gpus import GPUS
from services.core.planning.model_sizes import ModelSizes

RESERVED_BYTES = 1.5e9
"""Of a card: the driver's context, the kernels' workspaces, activations and frames."""


class DoesNotFitError(Exception):
    """The text says what would fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertPods:
    """A group of experts over all layers, cut into pods of at most `layers_per_pod` layers."""

    experts_per_group: int
    num_groups: int
    pods_per_group: int
    layers_per_pod: int
    group_bytes: int
    pod_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardMemory:
    """`max_streams` is how many of the asked context the KV pool holds."""

    weight_bytes: int
    kv_pool_bytes: float
    stream_bytes: int
    max_streams: int


def fit_expert_pods(
    sizes: ModelSizes, memory_bytes: float, *, experts_per_group: int = 1
) -> ExpertPods:
    """The fewest pods per group, evenly cut. Raises `DoesNotFitError`."""
    num_layers = sizes.config.num_hidden_layers
    layer_bytes = experts_per_group * sizes.slot_bytes
    fitting = int((memory_bytes - RESERVED_BYTES) // layer_bytes)
    if fitting < 1:
        needed = layer_bytes + RESERVED_BYTES
        raise DoesNotFitError(
            f"one layer of {experts_per_group} {sizes.weights.name} expert(s) takes "
            f"{layer_bytes / 1e9:.1f} GB; {_cards_of(needed)}"
        )
    pods = -(-num_layers // fitting)
    layers_per_pod = -(-num_layers // pods)
    return ExpertPods(
        experts_per_group=experts_per_group,
        num_groups=-(-sizes.config.num_local_experts // experts_per_group),
        pods_per_group=pods,
        layers_per_pod=layers_per_pod,
        group_bytes=num_layers * layer_bytes,
        pod_bytes=layers_per_pod * layer_bytes,
    )


def fit_shard(sizes: ModelSizes, memory_bytes: float, context: int) -> ShardMemory:
    """Raises `DoesNotFitError` where not even one stream fits beside the weights."""
    stream_bytes = context * sizes.kv_bytes_per_token
    pool_bytes = memory_bytes - RESERVED_BYTES - sizes.shared_bytes
    max_streams = int(max(pool_bytes, 0.0) // stream_bytes)
    if max_streams < 1:
        needed = sizes.shared_bytes + stream_bytes + RESERVED_BYTES
        longest = int(max(pool_bytes, 0.0) // sizes.kv_bytes_per_token)
        shorter = f", or a context of at most {longest} tokens" if longest else ""
        raise DoesNotFitError(
            f"an attention shard takes {sizes.shared_bytes / 1e9:.1f} GB of weights and "
            f"{stream_bytes / 1e9:.1f} GB of KV cache for one stream of {context} tokens; "
            f"{_cards_of(needed)}{shorter}"
        )
    return ShardMemory(
        weight_bytes=sizes.shared_bytes,
        kv_pool_bytes=pool_bytes,
        stream_bytes=stream_bytes,
        max_streams=max_streams,
    )


def _cards_of(needed_bytes: float) -> str:
    names = [gpu.name for gpu in GPUS.values() if gpu.memory_bytes >= needed_bytes]
    known = f" ({', '.join(names)})" if names else ""
    return f"it needs cards of {needed_bytes / 1e9:.1f} GB or more{known}"
