from __future__ import annotations

import pytest

from services.core.errors import ConfigurationError
from services.core.planning.fleet import CardCosts, FleetOptions, FleetPlan, FleetPlanner
from services.core.planning.gpus import GPUS, find_gpu
from services.core.planning.machine import Efficiency, Network, gpu_machine
from services.core.planning.model_sizes import PUBLISHED_MODELS, ModelSizes
from services.core.planning.weight_formats import weight_format
from services.core.planning.workload import Workload

MODEL = PUBLISHED_MODELS["mixtral-8x22b"]


def plan(
    *,
    gpu: str = "l4",
    precision: str = "int4",
    users: int = 200,
    context: int = 8192,
    prompt_tokens: int = 1024,
    output_tokens: int = 256,
    gigabits: float = 25,
    target_s: float | None = None,
    skew: float | None = None,
    options: FleetOptions | None = None,
) -> FleetPlan:
    card = find_gpu(gpu)
    workload = Workload(
        users=users,
        context=context,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        tpot_target_s=target_s,
        hot_share=skew,
    )
    workload.check(MODEL)
    return FleetPlanner(
        ModelSizes(config=MODEL, weights=weight_format(precision)),
        gpu_machine(card, efficiency=Efficiency()),
        Network(bandwidth=gigabits * 1e9 / 8, delay_s=50e-6),
        CardCosts(memory_bytes=card.memory_bytes, price_per_hour=card.price_per_hour),
        workload,
        options or FleetOptions(),
    ).plan()


def test_an_expert_that_does_not_fit_a_card_is_cut_by_layers() -> None:
    bf16, int8, int4 = (plan(precision=name).pods for name in ("bf16", "int8", "int4"))
    assert bf16 and int8 and int4
    assert (bf16.pods_per_group, bf16.layers_per_pod) == (2, 28)
    assert bf16.pod_bytes / 1e9 == pytest.approx(16.9, abs=0.05)
    assert (int8.pods_per_group, int8.layers_per_pod) == (1, 56)
    assert int4.pods_per_group == 1


def test_the_kv_cache_sets_the_number_of_shards() -> None:
    seen = plan()
    assert seen.shard is not None
    # 24 GB less 1.5 reserved and 10.7 of weights holds six streams of 1.88 GB.
    assert seen.shard.max_streams == 6
    assert seen.num_shards == 34
    assert seen.size_set_by == "memory"
    assert seen.num_cards == 34 + 8 * seen.replicas


def test_cost_is_cards_times_price_over_tokens() -> None:
    seen = plan()
    assert seen.rates is not None
    assert seen.tokens_per_s == pytest.approx(200 / seen.rates.tpot_s)
    per_hour = seen.num_cards * GPUS["l4"].price_per_hour
    assert seen.dollars_per_million_tokens == pytest.approx(
        per_hour / (seen.tokens_per_s * 3600) * 1e6
    )


@pytest.mark.parametrize("target_s", [None, 0.25])
def test_more_users_never_need_fewer_shards(target_s: float | None) -> None:
    users = (1, 7, 20, 33, 60, 100, 160, 200, 300)
    shards = [plan(users=count, target_s=target_s).num_shards for count in users]
    assert shards == sorted(shards)


def test_a_faster_network_is_never_slower() -> None:
    tpots = [plan(gigabits=rate).rates.tpot_s for rate in (100, 25, 10, 1)]  # type: ignore[union-attr]
    assert tpots == sorted(tpots)


def test_fewer_bits_are_never_slower() -> None:
    tpots = [plan(precision=name).rates.tpot_s for name in ("int4", "int8", "bf16")]  # type: ignore[union-attr]
    assert tpots == sorted(tpots)


def test_a_target_is_met_with_more_shards_or_replicas() -> None:
    loose, tight = plan(), plan(target_s=0.2)
    assert loose.rates and tight.rates
    assert loose.rates.tpot_s > 0.2 >= tight.rates.tpot_s
    assert tight.problem is None
    assert tight.size_set_by == "the TPOT target"
    assert tight.num_cards > loose.num_cards


def test_a_target_beyond_reach_is_told_with_the_best_there_is() -> None:
    seen = plan(precision="bf16", target_s=0.01)
    assert seen.problem is not None
    assert "10 ms" in seen.problem
    assert "fewer bits" in seen.problem
    assert seen.rates is not None
    assert seen.rates.tpot_s > 0.01


def test_a_shard_that_does_not_fit_says_which_cards_would() -> None:
    seen = plan(context=65536)
    assert seen.rates is None
    assert seen.problem is not None
    assert "27.2 GB or more (l40s, a100-40" in seen.problem
    assert "context of at most 51543 tokens" in seen.problem


def test_experts_that_do_not_fit_even_by_layer_say_what_would() -> None:
    sizes = ModelSizes(config=MODEL)
    card = CardCosts(memory_bytes=2e9, price_per_hour=0.1)
    planner = FleetPlanner(
        sizes,
        gpu_machine(find_gpu("l4"), efficiency=Efficiency()),
        Network(bandwidth=3e9, delay_s=0.0),
        card,
        Workload(users=1, context=1024, prompt_tokens=64, output_tokens=64),
        FleetOptions(),
    )
    seen = planner.plan()
    assert seen.problem is not None
    assert "one layer of 1 bf16 expert(s) takes 0.6 GB" in seen.problem


def test_prompts_slow_the_decoding_of_others() -> None:
    short, long = plan(prompt_tokens=64), plan(prompt_tokens=4096)
    assert short.rates and long.rates
    assert short.rates.tpot_s < long.rates.tpot_s
    assert short.rates.prefill_share < long.rates.prefill_share
    assert short.rates.ttft_s < long.rates.ttft_s


def test_a_hot_expert_gets_more_replicas_when_the_target_needs_them() -> None:
    even, hot = plan(target_s=0.2), plan(target_s=0.2, skew=0.9)
    assert even.replicas == even.hot_replicas
    assert hot.hot_replicas > hot.replicas


def test_two_experts_share_a_card_where_asked() -> None:
    seen = plan(options=FleetOptions(experts_per_pod=2))
    assert seen.pods is not None
    assert seen.pods.num_groups == 4
    assert seen.pods.pod_bytes / 1e9 == pytest.approx(18.0, abs=0.05)


def test_merging_frames_is_never_slower() -> None:
    merged, apart = plan(), plan(options=FleetOptions(merge_frames=False))
    assert merged.rates and apart.rates
    assert merged.rates.tpot_s < apart.rates.tpot_s


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"context": 100_000}, "limit of 65536"),
        ({"prompt_tokens": 8192}, "do not fit"),
        ({"users": 0}, "at least 1"),
        ({"skew": 0.1}, "from 0.25"),
        ({"skew": 1.1}, "from 0.25"),
        ({"target_s": 0.0}, "above 0"),
    ],
)
def test_a_workload_that_cannot_be_is_refused(changes: dict[str, float], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        plan(**changes)  # type: ignore[arg-type]


def test_an_unknown_card_is_refused_with_the_choices() -> None:
    with pytest.raises(ConfigurationError, match="l4, a10, rtx-3090"):
        find_gpu("l5")
    with pytest.raises(ConfigurationError, match="--gpu-bandwidth, --gpu-tflops"):
        find_gpu("custom", memory_bytes=24e9, price_per_hour=1.0)


def test_a_card_without_the_arithmetic_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="rtx-3090 has no fp8"):
        gpu_machine(find_gpu("rtx-3090"), math="fp8", efficiency=Efficiency())
