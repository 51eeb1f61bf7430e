"""The time of one engine step, from bytes, operations, frames and round trips.

docs/planning.md derives every formula. One micro-batch of T tokens passes a layer like this:

    attention -> dispatch -> wire there -> busiest expert -> wire back -> (next layer)
    '---- the shard is busy ----'          '- a pod is busy -'

A layer takes as long as the longest of: that chain; the shard's own work for all micro-batches in
flight; the pods' work for all frames that the shards have in flight; the links' bytes. Where all
processes share the same cores, compute adds up instead of overlapping.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from services.core.planning.kernels import Floats
from services.core.planning.machine import Machine, Network
from services.core.planning.model_sizes import ModelSizes
from services.core.planning.routing import Routing

Resource = Literal["bandwidth", "compute", "wire", "round trips"]
ACTIVATION_BYTES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the fleet is cut.

    `groups` are the experts of each expert pod (one group per worker); empty: experts in process.
    A group is cut into `pods_per_group` by layer range and has `replicas` copies, the group of
    expert 0 `hot_replicas`. `num_clusters` of the num_shards x num_micro_batches micro-batches in
    flight arrive separately; those within a cluster are merged into one computation by the worker.
    """

    groups: tuple[tuple[int, ...], ...]
    num_shards: int = 1
    num_micro_batches: int = 1
    pods_per_group: int = 1
    replicas: int = 1
    hot_replicas: int = 1
    num_clusters: int | None = None

    @property
    def num_in_flight(self) -> int:
        return self.num_shards * self.num_micro_batches

    def replicas_of(self, group: tuple[int, ...]) -> int:
        return self.hot_replicas if 0 in group else self.replicas

    def clusters_of(self, group: tuple[int, ...]) -> int:
        """Frames of one layer that a group computes per step: a replica merges only its own."""
        clusters = self.num_in_flight if self.num_clusters is None else self.num_clusters
        return min(self.num_in_flight, max(clusters, self.replicas_of(group)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one shard computes in a step. A decode batch has `num_tokens` sequences of `context`
    tokens; a prefill chunk (`num_sampled` fewer than tokens) is the end of one such sequence."""

    num_tokens: int
    context: float
    num_sampled: int | None = None

    @property
    def num_rows_sampled(self) -> int:
        return self.num_tokens if self.num_sampled is None else self.num_sampled

    @property
    def num_context_reads(self) -> int:
        """Sequences whose keys and values are read: a chunk's tokens share theirs."""
        if self.num_sampled is None:
            return self.num_tokens
        return self.num_sampled + (self.num_tokens > self.num_sampled)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTimes:
    """Seconds of one micro-batch in one layer. `stall_s` is what a layer takes beyond this chain,
    per layer, because something else is busy with other micro-batches."""

    attention_s: float
    dispatch_s: float
    wire_s: float
    delay_s: float
    expert_s: float
    stall_s: float

    @property
    def chain_s(self) -> float:
        return self.attention_s + self.dispatch_s + self.wire_s + self.delay_s + self.expert_s


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """`layers_s` is all layers, `step_s` the whole. `shares` of the step by what binds it.

    `pod_busy_s` is how long the busiest expert pod computes for all shards' steps."""

    step_s: float
    layers_s: float
    head_s: float
    sample_s: float
    overhead_s: float
    pod_busy_s: float
    layer: LayerTimes
    shares: dict[Resource, float]

    @property
    def bound_by(self) -> Resource:
        return max(self.shares, key=lambda resource: self.shares[resource])


class StepModel:
    """Predicts steps of one model on one kind of machine."""

    def __init__(
        self, sizes: ModelSizes, machine: Machine, network: Network, routing: Routing
    ) -> None:
        self._sizes = sizes
        self._config = sizes.config
        self._machine = machine
        self._network = network
        self._routing = routing

    def step(self, batch: Batch, layout: Layout) -> StepTime:
        micro = _part_of(batch, layout.num_micro_batches)
        num_micro = min(layout.num_micro_batches, batch.num_tokens)
        attention_s = self.attention_s(micro)
        dispatch_s = self._dispatch_s(micro, layout)
        wire_s, link_s = self._wire_s(micro, layout)
        delay_s = 2 * self._network.delay_s if layout.groups else 0.0
        expert_s, pod_s = self._expert_s(micro, layout)

        chain_s = attention_s + dispatch_s + wire_s + delay_s + expert_s
        shard_s = num_micro * (attention_s + dispatch_s)
        if self._machine.shares_cores:
            shard_s += num_micro * expert_s
        expert_kind = self._expert_kind(micro, layout)
        busy: list[tuple[float, Resource]] = [
            (shard_s, self._shard_kind(micro, attention_s, dispatch_s)),
            (pod_s, expert_kind),
            (link_s, "wire"),
        ]
        longest_s, stall_kind = max(busy)
        stall_s = max(0.0, longest_s - chain_s)

        num_layers = self._config.num_hidden_layers
        head_s = self._head_s(batch)
        sample_s = self._sample_s(batch)
        overhead_s = self._overhead_s(batch)
        by_resource: dict[Resource, float] = dict.fromkeys(
            ("bandwidth", "compute", "wire", "round trips"), 0.0
        )
        by_resource[self._attention_kind(micro)] += num_layers * attention_s + head_s
        by_resource["round trips"] += num_layers * (dispatch_s + delay_s) + sample_s + overhead_s
        by_resource["wire"] += num_layers * wire_s
        by_resource[expert_kind] += num_layers * expert_s
        by_resource[stall_kind] += num_layers * stall_s
        layers_s = num_layers * (chain_s + stall_s)
        step_s = layers_s + head_s + sample_s + overhead_s
        return StepTime(
            step_s=step_s,
            layers_s=layers_s,
            head_s=head_s,
            sample_s=sample_s,
            overhead_s=overhead_s,
            pod_busy_s=num_layers * pod_s,
            layer=LayerTimes(
                attention_s=attention_s,
                dispatch_s=dispatch_s,
                wire_s=wire_s,
                delay_s=delay_s,
                expert_s=expert_s,
                stall_s=stall_s,
            ),
            shares={resource: seconds / step_s for resource, seconds in by_resource.items()},
        )

    def attention_s(self, batch: Batch) -> float:
        """Projections, norms, gate and reading the context, or the scores of a prefill chunk."""
        params = self._sizes.attention_params
        products = self._machine.attention.time_s(
            ACTIVATION_BYTES * params, params, batch.num_tokens
        )
        return float(products) + self._context_s(batch) + batch.num_tokens * self._machine.token_s

    def _context_s(self, batch: Batch) -> float:
        config, machine = self._config, self._machine
        visible = min(batch.context, config.sliding_window or batch.context)
        kv_bytes = self._sizes.kv_bytes_per_token / config.num_hidden_layers * visible
        score_flops = 4 * config.num_attention_heads * config.head_dim * visible
        return max(
            batch.num_context_reads * kv_bytes / machine.kv_bandwidth,
            batch.num_tokens * score_flops / machine.attention_flops,
        )

    def _dispatch_s(self, batch: Batch, layout: Layout) -> float:
        """Planning, packing, frames, reading answers and combining, on the shard's thread."""
        host = self._machine.host
        if not layout.groups:
            return host.local_layer_s
        num_frames, num_bytes = self.frames(batch, layout)
        return host.layer_s + num_frames * host.frame_s + num_bytes * host.byte_s

    def frames(self, batch: Batch, layout: Layout) -> tuple[float, float]:
        """Frames of one layer call, and the bytes that they and their answers carry."""
        tokens = [self._routing.tokens_of_group(batch.num_tokens, group) for group in layout.groups]
        num_frames = float(sum((count > 0).mean() for count in tokens))
        return num_frames, 2 * self._row_bytes * float(sum(count.mean() for count in tokens))

    def _wire_s(self, batch: Batch, layout: Layout) -> tuple[float, float]:
        """Of one micro-batch there and back, and what a link is busy with per layer, one way."""
        if not layout.groups:
            return 0.0, 0.0
        shard_bytes = worker_bytes = link_bytes = 0.0
        for group in layout.groups:
            tokens = self._routing.tokens_of_group(batch.num_tokens, group)
            num_bytes = self._row_bytes * float(tokens.mean())
            shard_bytes += num_bytes
            clusters = layout.clusters_of(group)
            worker_bytes = max(worker_bytes, num_bytes * layout.num_in_flight / clusters)
            pods = layout.pods_per_group * layout.replicas_of(group)
            link_bytes = max(link_bytes, num_bytes * layout.num_in_flight / pods)
        link_bytes = max(link_bytes, shard_bytes * layout.num_micro_batches)
        rate = self._network.bandwidth
        return 2 * max(shard_bytes, worker_bytes) / rate, link_bytes / rate

    def _expert_s(self, batch: Batch, layout: Layout) -> tuple[float, float]:
        """The slowest pod's time for one cluster, and what a pod is busy with per layer."""
        machine = self._machine
        groups = layout.groups or (tuple(range(self._config.num_local_experts)),)
        own: list[Floats] = []
        busy_s = 0.0
        together: Floats = np.zeros(1)
        for group in groups:
            clusters = layout.clusters_of(group)
            merged = -(-batch.num_tokens * layout.num_in_flight // clusters)
            rows = self._routing.rows_per_expert(merged)[:, list(group)]
            times = self._kernel_s(rows, together=False).sum(axis=1)
            own.append(times)
            pods = layout.pods_per_group * layout.replicas_of(group)
            busy_s = max(busy_s, clusters * float(times.mean()) / pods)
            if machine.shares_cores:
                together = together + self._kernel_s(rows, together=True).sum(axis=1)
        slowest = np.max(own, axis=0)
        if machine.shares_cores:
            slowest = np.maximum(slowest, together)
            busy_s = layout.num_micro_batches * float(slowest.mean())
        return float(slowest.mean()), busy_s

    def _kernel_s(self, rows: Floats, *, together: bool) -> Floats:
        kernel = self._machine.experts
        if together and self._machine.experts_together is not None:
            kernel = self._machine.experts_together
        return kernel.time_s(self._sizes.slot_bytes, self._sizes.expert_params, rows)

    def _head_s(self, batch: Batch) -> float:
        params = self._sizes.head_params
        rows = batch.num_rows_sampled
        return float(self._machine.head.time_s(ACTIVATION_BYTES * params, params, rows))

    def _sample_s(self, batch: Batch) -> float:
        host, rows = self._machine.host, batch.num_rows_sampled
        return host.sample_s + rows * self._config.vocab_size * host.logit_s if rows else 0.0

    def _overhead_s(self, batch: Batch) -> float:
        return self._machine.host.step_s + batch.num_rows_sampled * self._machine.host.sequence_s

    def _attention_kind(self, batch: Batch) -> Resource:
        params = self._sizes.attention_params
        bound = self._machine.attention.is_compute_bound(
            ACTIVATION_BYTES * params, params, batch.num_tokens
        )
        return "compute" if bound else "bandwidth"

    def _shard_kind(self, batch: Batch, attention_s: float, dispatch_s: float) -> Resource:
        return "round trips" if dispatch_s > attention_s else self._attention_kind(batch)

    def _expert_kind(self, batch: Batch, layout: Layout) -> Resource:
        groups = layout.groups or (tuple(range(self._config.num_local_experts)),)
        merged = max(
            -(-batch.num_tokens * layout.num_in_flight // layout.clusters_of(group))
            for group in groups
        )
        rows = float(self._routing.rows_per_expert(merged).max(axis=1).mean())
        bound = self._machine.experts.is_compute_bound(
            self._sizes.slot_bytes, self._sizes.expert_params, rows
        )
        return "compute" if bound else "bandwidth"

    @property
    def _row_bytes(self) -> int:
        return ACTIVATION_BYTES * self._config.hidden_size


def _part_of(batch: Batch, num_micro_batches: int) -> Batch:
    """The larger part of a batch cut into micro-batches; a chunk's rows are cut alike."""
    tokens = -(-batch.num_tokens // num_micro_batches)
    sampled = batch.num_sampled
    if sampled is not None:
        sampled = min(sampled, tokens)
    return Batch(num_tokens=tokens, context=batch.context, num_sampled=sampled)
