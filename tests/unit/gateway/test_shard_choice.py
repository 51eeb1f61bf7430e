from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from services.core.generation import GenerateRequest, SamplingParams
from services.gateway.shard_choice import CHUNK_TOKENS, ShardChooser

IDLE = {"a": 0.0, "b": 0.0, "c": 0.0}


def test_shards_without_load_take_turns() -> None:
    """Whoever asks again when it has an answer would else always meet the same one."""
    chooser = ShardChooser()
    chosen = [chooser.choose(_request([number]), IDLE) for number in range(9)]
    assert Counter(chosen[:3]) == Counter(chosen[3:6]) == Counter(IDLE.keys())


def test_a_new_shard_has_its_turn_at_once_and_one_that_left_is_forgotten() -> None:
    chooser = ShardChooser()
    for number in range(4):
        chooser.choose(_request([number]), {"a": 0.0, "b": 0.0})
    assert chooser.choose(_request([9]), IDLE) == "c"
    assert chooser.choose(_request([9]), {"c": 0.0}) == "c"


def test_the_least_loaded_comes_before_whose_turn_it_is() -> None:
    chooser = ShardChooser()
    load = {"a": 0.0, "b": 64.0}
    assert [chooser.choose(_request([number]), load) for number in range(3)] == ["a"] * 3


def test_a_known_prefix_keeps_its_shard_until_that_is_clearly_busier() -> None:
    chooser = ShardChooser()
    prefix = list(range(2 * CHUNK_TOKENS))
    first = chooser.choose(_request(prefix), IDLE)
    for number in range(3):
        assert chooser.choose(_request([*prefix, number]), IDLE) == first
    assert chooser.choose(_request([*prefix, 9]), IDLE | {first: 4096.0}) != first


def _request(prompt: Sequence[int]) -> GenerateRequest:
    return GenerateRequest(
        request_id="r",
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(max_tokens=1),
    )
