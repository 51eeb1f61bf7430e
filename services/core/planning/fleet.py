"""How many shards and expert replicas a workload needs, and how fast and dear that fleet is.

The search is small and goes in one order, so that more users never get fewer shards: first the
fewest attention shards that hold the KV cache (and can meet the target, if there is one), then
expert replicas: the fewest that meet the target, or without one the number with the lowest cost
per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from services.core.planning.machine import Machine, Network
from services.core.planning.model_sizes import ModelSizes
from services.core.planning.pods import (
    DoesNotFitError,
    ExpertPods,
    ShardMemory,
    fit_expert_pods,
    fit_shard,
)
from services.core.planning.routing import Routing
from services.core.planning.step_model import Batch, Layout, Resource, StepModel, StepTime
from services.core.planning.workload import Workload

MAX_MICRO_BATCHES = 3
MAX_REPLICAS = 32
CHUNK_TOKENS = 512
"""The engine's token budget of a step with prefill in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CardCosts:
    memory_bytes: float
    price_per_hour: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetOptions:
    """`num_micro_batches` None: whichever of 1 to 3 is fastest. Without `merge_frames` workers
    never compute frames of several shards together."""

    experts_per_pod: int = 1
    num_micro_batches: int | None = None
    merge_frames: bool = True
    chunk_tokens: int = CHUNK_TOKENS


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What a stream sees. `prefill_share` is the share of a shard's time in steps with prefill."""

    ttft_s: float
    tpot_s: float
    prefill_share: float
    decode: StepTime
    layout: Layout
    shares: dict[Resource, float]

    @property
    def bound_by(self) -> Resource:
        return max(self.shares, key=lambda resource: self.shares[resource])


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetPlan:
    """`problem` says what does not fit or which target is missed, and what would help."""

    weights: str
    pods: ExpertPods | None
    shard: ShardMemory | None
    num_shards: int
    streams_per_shard: int
    replicas: int
    hot_replicas: int
    num_cards: int
    rates: Rates | None
    tokens_per_s: float
    dollars_per_hour: float
    dollars_per_million_tokens: float
    size_set_by: str
    problem: str | None


class FleetPlanner:
    """Plans one model at one precision on one kind of card. Every pod has a card of its own."""

    def __init__(
        self,
        sizes: ModelSizes,
        machine: Machine,
        network: Network,
        card: CardCosts,
        workload: Workload,
        options: FleetOptions,
    ) -> None:
        config = sizes.config
        self._sizes = sizes
        self._card = card
        self._workload = workload
        self._options = options
        routing = Routing(config.num_local_experts, config.num_experts_per_tok, workload.hot_share)
        self._model = StepModel(sizes, machine, network, routing)

    def plan(self) -> FleetPlan:
        """Never raises for what does not fit; the plan's `problem` says so."""
        try:
            pods = fit_expert_pods(
                self._sizes,
                self._card.memory_bytes,
                experts_per_group=self._options.experts_per_pod,
            )
        except DoesNotFitError as error:
            return self._nothing(None, str(error))
        try:
            shard = fit_shard(self._sizes, self._card.memory_bytes, self._workload.context)
        except DoesNotFitError as error:
            return self._nothing(pods, str(error))
        fewest = next(_shard_counts(-(-self._workload.users // shard.max_streams)))
        if self._workload.tpot_target_s is None:
            return self._cheapest(pods, shard, fewest)
        return self._within_target(pods, shard, fewest, self._workload.tpot_target_s)

    def rates(self, pods: ExpertPods, num_shards: int, replicas: int, hot_replicas: int) -> Rates:
        """Of the best number of micro-batches and clusters."""
        wanted = self._options.num_micro_batches
        counts = range(1, MAX_MICRO_BATCHES + 1) if wanted is None else (wanted,)
        candidates = [
            self._rates(self._layout(pods, num_shards, replicas, hot_replicas, micro, clusters))
            for micro in counts
            for clusters in self._cluster_counts(num_shards, micro)
        ]
        return min(candidates, key=lambda rates: rates.tpot_s)

    def _rates(self, layout: Layout) -> Rates:
        """Steps with a prefill chunk alternate with plain decode steps as often as prompts come:
        a stream's every `output_tokens` steps bring one prompt for each stream of its shard."""
        work = self._workload
        streams = -(-work.users // layout.num_shards)
        decode = self._model.step(Batch(num_tokens=streams, context=work.context), layout)
        room = self._options.chunk_tokens - streams
        part = min(work.prompt_tokens, max(room, self._options.chunk_tokens // 4))
        num_chunks = -(-work.prompt_tokens // part)
        alone = Layout(
            groups=layout.groups,
            num_micro_batches=layout.num_micro_batches,
            pods_per_group=layout.pods_per_group,
            replicas=layout.replicas,
            hot_replicas=layout.hot_replicas,
        )
        mixed = self._model.step(
            Batch(num_tokens=streams + part, context=work.context, num_sampled=streams), alone
        )
        mixed_s = max(mixed.step_s, decode.step_s)
        mixed_steps = streams * num_chunks / work.output_tokens
        plain_steps = max(0.0, 1.0 - mixed_steps)
        pods_s = decode.pod_busy_s + layout.num_shards * mixed_steps * mixed.pod_busy_s
        tpot_s = max(plain_steps * decode.step_s + mixed_steps * mixed_s, pods_s)
        prefill_share = min(1.0, mixed_steps * mixed_s / tpot_s)
        prefill_s = num_chunks * mixed_s
        most_wait_s = (streams - 1) / 2 * prefill_s
        wait_s = most_wait_s
        if prefill_share < 1:
            wait_s = min(most_wait_s, prefill_share / (2 * (1 - prefill_share)) * prefill_s)
        weighted = {
            resource: plain_steps * decode.step_s * share
            + mixed_steps * mixed_s * mixed.shares[resource]
            for resource, share in decode.shares.items()
        }
        total = sum(weighted.values())
        return Rates(
            ttft_s=wait_s + prefill_s,
            tpot_s=tpot_s,
            prefill_share=prefill_share,
            decode=decode,
            layout=layout,
            shares={resource: value / total for resource, value in weighted.items()},
        )

    def _cheapest(self, pods: ExpertPods, shard: ShardMemory, num_shards: int) -> FleetPlan:
        best: FleetPlan | None = None
        worse_in_a_row = 0
        for replicas, hot_replicas in self._replica_counts(num_shards):
            rates = self.rates(pods, num_shards, replicas, hot_replicas)
            plan = self._plan(pods, shard, rates, size_set_by="memory")
            if best is None or plan.dollars_per_million_tokens < best.dollars_per_million_tokens:
                best, worse_in_a_row = plan, 0
            else:
                worse_in_a_row += 1
            if worse_in_a_row > MAX_MICRO_BATCHES:
                break
        assert best is not None
        return best

    def _within_target(
        self, pods: ExpertPods, shard: ShardMemory, fewest: int, target_s: float
    ) -> FleetPlan:
        fastest: Rates | None = None
        for num_shards in _shard_counts(fewest):
            most = self._most_replicas(num_shards)
            rates = self.rates(pods, num_shards, most, most)
            if fastest is None or rates.tpot_s < fastest.tpot_s:
                fastest = rates
            if rates.tpot_s <= target_s:
                set_by = "memory" if num_shards == fewest else "the TPOT target"
                fitting = self._fewest_replicas(pods, num_shards, target_s)
                return self._plan(pods, shard, fitting, size_set_by=set_by)
            if num_shards >= self._workload.users:
                break
        assert fastest is not None
        return self._plan(
            pods,
            shard,
            fastest,
            size_set_by="the TPOT target",
            problem=(
                f"no fleet of such cards reaches {target_s * 1e3:.0f} ms per token: the best is "
                f"{fastest.tpot_s * 1e3:.0f} ms, bound by {fastest.bound_by}; fewer bits, a "
                "faster card or a shorter context would help"
            ),
        )

    def _fewest_replicas(self, pods: ExpertPods, num_shards: int, target_s: float) -> Rates:
        """The target is met with the most replicas, so some number meets it."""
        most = self._most_replicas(num_shards)
        low, high = 0, most
        while high - low > 1:
            middle = (low + high) // 2
            meets = self.rates(pods, num_shards, middle, most).tpot_s <= target_s
            low, high = (low, middle) if meets else (middle, high)
        replicas = high
        hot_counts = [replicas]
        if self._workload.hot_share is not None:
            hot_counts = list(range(replicas, most + 1))
        for hot_replicas in hot_counts:
            rates = self.rates(pods, num_shards, replicas, hot_replicas)
            if rates.tpot_s <= target_s:
                return rates
        return self.rates(pods, num_shards, replicas, most)

    def _replica_counts(self, num_shards: int) -> Iterator[tuple[int, int]]:
        most = self._most_replicas(num_shards)
        for replicas in range(1, most + 1):
            yield replicas, replicas
            if self._workload.hot_share is not None:
                for extra in range(1, MAX_MICRO_BATCHES + 1):
                    if replicas + extra <= most:
                        yield replicas, replicas + extra

    def _most_replicas(self, num_shards: int) -> int:
        """A frame goes to one replica, so more than are in flight would be idle."""
        micro = self._options.num_micro_batches or MAX_MICRO_BATCHES
        return min(MAX_REPLICAS, num_shards * micro)

    def _cluster_counts(self, num_shards: int, micro: int) -> list[int]:
        """How many arrive separately: a power of two for each micro-batch, up to all of them. Those
        of one shard are never together: one is computed while the other is away."""
        if not self._options.merge_frames:
            return [num_shards * micro]
        powers = [1 << bit for bit in range((num_shards - 1).bit_length())]
        return [micro * count for count in (*powers, num_shards)]

    def _layout(
        self,
        pods: ExpertPods,
        num_shards: int,
        replicas: int,
        hot_replicas: int,
        num_micro_batches: int,
        num_clusters: int,
    ) -> Layout:
        num_experts, size = self._sizes.config.num_local_experts, pods.experts_per_group
        groups = tuple(
            tuple(range(first, min(first + size, num_experts)))
            for first in range(0, num_experts, size)
        )
        return Layout(
            groups=groups,
            num_shards=num_shards,
            num_micro_batches=num_micro_batches,
            pods_per_group=pods.pods_per_group,
            replicas=replicas,
            hot_replicas=hot_replicas,
            num_clusters=num_clusters,
        )

    def _plan(
        self,
        pods: ExpertPods,
        shard: ShardMemory,
        rates: Rates,
        *,
        size_set_by: str,
        problem: str | None = None,
    ) -> FleetPlan:
        layout = rates.layout
        groups = (pods.num_groups - 1) * layout.replicas + layout.hot_replicas
        num_cards = layout.num_shards + groups * pods.pods_per_group
        per_hour = num_cards * self._card.price_per_hour
        tokens_per_s = self._workload.users / rates.tpot_s
        return FleetPlan(
            weights=self._sizes.weights.name,
            pods=pods,
            shard=shard,
            num_shards=layout.num_shards,
            streams_per_shard=-(-self._workload.users // layout.num_shards),
            replicas=layout.replicas,
            hot_replicas=layout.hot_replicas,
            num_cards=num_cards,
            rates=rates,
            tokens_per_s=tokens_per_s,
            dollars_per_hour=per_hour,
            dollars_per_million_tokens=per_hour / (tokens_per_s * 3600) * 1e6,
            size_set_by=size_set_by,
            problem=problem,
        )

    def _nothing(self, pods: ExpertPods | None, problem: str) -> FleetPlan:
        return FleetPlan(
            weights=self._sizes.weights.name,
            pods=pods,
            shard=None,
            num_shards=0,
            streams_per_shard=0,
            replicas=0,
            hot_replicas=0,
            num_cards=0,
            rates=None,
            tokens_per_s=0.0,
            dollars_per_hour=0.0,
            dollars_per_million_tokens=0.0,
            size_set_by="memory",
            problem=problem,
        )


def _shard_counts(fewest: int) -> Iterator[int]:
    """Fixed counts, a tenth apart above 64, from the first that is at least `fewest` on; fixed, so
    that a larger workload looks at no count that a smaller one does not."""
    count = 1
    while True:
        if count >= fewest:
            yield count
        count = count + 1 if count < 64 else -(-count * 11 // 10)
