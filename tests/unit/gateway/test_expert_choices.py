"""What answers tell about the gate's choices, and how often consecutive tokens share them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from services.core.errors import ShardLostError, UnavailableError
from services.core.generation import GenerateRequest, GenerationDelta
from services.gateway.answers import dumps_in_pieces
from services.gateway.expert_choices import (
    Gates,
    count_repeats,
    expert_choices_json,
    random_any,
    random_first,
)
from services.gateway.sse import dumps
from tests.support.fake_shard import FakeShard, Script, Step, dying
from tests.unit.gateway.http import client_of, encode, error_of
from tests.unit.gateway.tiny_models import write_model_folder

GATES = Gates(num_layers=2, num_experts=8, top_k=2)
# Four tokens; of each the two choices of layer 0, then those of layer 1.
CHOICES = bytes((0, 1, 5, 4, 0, 2, 4, 5, 3, 0, 6, 7, 4, 5, 6, 1))


def test_repeats_are_counted_layer_by_layer() -> None:
    first, second = count_repeats(CHOICES, GATES)
    # Layer 0: 0 1 | 0 2 | 3 0 | 4 5: the favourite repeats once, 0 is shared twice.
    assert first.layer == 0
    assert first.first == pytest.approx(1 / 3)
    assert first.any == pytest.approx(2 / 3)
    # Layer 1: 5 4 | 4 5 | 6 7 | 6 1: the favourite repeats once (6), pairs 0 and 2 share.
    assert second.layer == 1
    assert second.first == pytest.approx(1 / 3)
    assert second.any == pytest.approx(2 / 3)


def test_one_token_has_no_repeats() -> None:
    for choices in (b"", CHOICES[:4]):
        assert [(r.layer, r.first, r.any) for r in count_repeats(choices, GATES)] == [
            (0, None, None),
            (1, None, None),
        ]


def test_chance_is_as_the_mixtral_paper_has_it() -> None:
    assert random_first(GATES) == 0.125
    assert random_any(GATES) == pytest.approx(1 - 6 / 8 * 5 / 7)
    assert random_any(Gates(num_layers=1, num_experts=4, top_k=4)) == 1
    assert random_any(Gates(num_layers=1, num_experts=4, top_k=3)) == 1, "three of four must meet"
    assert random_any(Gates(num_layers=1, num_experts=5, top_k=1)) == pytest.approx(0.2)


def test_prompt_and_completion_are_told_apart_and_a_token_not_run_is_null() -> None:
    told = expert_choices_json(
        CHOICES, GATES, prompt_token_ids=[7, 8], completion_token_ids=[9, 10, 11], token_bytes=None
    )
    assert told["num_layers"] == told["top_k"] == 2
    assert told["prompt"] == {
        "tokens": ["token_id:7", "token_id:8"],
        "experts": [[[0, 1], [5, 4]], [[0, 2], [4, 5]]],
    }
    assert told["completion"] == {
        "tokens": ["token_id:9", "token_id:10", "token_id:11"],
        "experts": [[[3, 0], [6, 7]], [[4, 5], [6, 1]], None],
    }
    assert [repeats["layer"] for repeats in told["repeats"]] == [0, 1]
    assert (told["random_first"], round(told["random_any"], 3)) == (0.125, 0.464)


def test_tokens_that_were_cut_away_do_not_count() -> None:
    told = expert_choices_json(
        CHOICES, GATES, prompt_token_ids=[7], completion_token_ids=[9], token_bytes=None
    )
    assert told["completion"]["experts"] == [[[0, 2], [4, 5]]]
    assert told["repeats"][0] == {"layer": 0, "first": 1.0, "any": 1.0}


def test_a_shard_that_tells_too_little_is_an_error() -> None:
    with pytest.raises(UnavailableError, match="2 tokens where 4"):
        expert_choices_json(
            CHOICES[:8],
            GATES,
            prompt_token_ids=[7, 8],
            completion_token_ids=[9, 10, 11],
            token_bytes=None,
        )


def test_an_answer_is_written_in_pieces_as_it_is_at_once() -> None:
    content = {
        "id": "ü\n",
        "choices": [{"experts": [[[0, 1]], None] * 100, "text": "x", "empty": []}, {"n": {}}],
        "usage": {"total": 3, "share": 0.5},
    }
    assert dumps_in_pieces(content) == dumps(content)


def chosen(request: GenerateRequest, index: int, position: int, gates: Gates) -> bytes:
    place = request.prompt_token_ids[0] + 3 * index + position
    return bytes((place + i) % gates.num_experts for i in range(gates.token_bytes))


def tells(token_ids: Sequence[int], gates: Gates) -> Script:
    """Choices of each delta are of the tokens before its own; the limit ends all choices."""

    def script(request: GenerateRequest) -> Sequence[Step]:
        assert request.return_expert_choices
        num_prompt = len(request.prompt_token_ids)
        last = request.sampling.max_tokens - 1
        steps: list[Step] = []
        for place, token_id in enumerate(token_ids[: last + 1]):
            known = range(num_prompt) if place == 0 else [num_prompt + place - 1]
            steps.append(
                tuple(
                    GenerationDelta(
                        index=index,
                        token_ids=(token_id,),
                        finish_reason="length" if place == last else None,
                        expert_choices=b"".join(chosen(request, index, at, gates) for at in known),
                    )
                    for index in range(request.n)
                )
            )
        return steps

    return script


@pytest.fixture(scope="module")
def tiny_gates() -> Gates:
    """Of the model that `model_folder` describes."""
    return Gates(num_layers=2, num_experts=4, top_k=2)


@pytest.fixture(scope="module")
def moe_folder(
    byte_level: Tokenizer, tiny_gates: Gates, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return write_model_folder(
        tmp_path_factory.mktemp("models") / "moe",
        byte_level,
        num_hidden_layers=tiny_gates.num_layers,
        num_local_experts=tiny_gates.num_experts,
        num_experts_per_tok=tiny_gates.top_k,
    )


@pytest.mark.parametrize("lost_after", [(), (1,), (3, 4)])
async def test_every_choice_tells_its_prompt_and_its_tokens(
    moe_folder: Path, byte_level: Tokenizer, tiny_gates: Gates, lost_after: Sequence[int]
) -> None:
    """Also when shards are lost half-way: what was told before is kept."""
    token_ids = encode(byte_level, " brown fox jumps over the lazy dog")
    assert len(token_ids) >= 6
    script = tells(token_ids, tiny_gates)
    lost = ShardLostError("it died")
    shard = FakeShard(dying(script, after=lost_after, error=lost) if lost_after else script)
    body = {"prompt": [[5, 6], [9]], "n": 2, "max_tokens": 6, "return_expert_choices": True}
    if lost_after:
        body["prompt"] = [5, 6]
    async with client_of(shard, moe_folder) as client:
        response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200
    choices = response.json()["choices"]
    assert len(shard.requests) == (len(lost_after) + 1 if lost_after else 2)
    for number, choice in enumerate(choices):
        request = next(
            r for r in shard.requests if r.prompt_token_ids == ((5, 6) if number < 2 else (9,))
        )
        told = choice["expert_choices"]
        num_prompt = len(request.prompt_token_ids)
        assert "".join(told["completion"]["tokens"]) == choice["text"]
        expected = [
            list(chosen(request, number % 2, at, tiny_gates)) for at in range(num_prompt + 5)
        ]
        nested = [[ids[:2], ids[2:]] for ids in expected]
        assert told["prompt"]["experts"] == nested[:num_prompt]
        assert told["completion"]["experts"] == [*nested[num_prompt:], None]


async def test_a_chat_tells_them_too(
    moe_folder: Path, byte_level: Tokenizer, tiny_gates: Gates
) -> None:
    shard = FakeShard(tells(encode(byte_level, " brown fox"), tiny_gates))
    body = {
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 2,
        "return_expert_choices": True,
    }
    async with client_of(shard, moe_folder) as client:
        (choice,) = (await client.post("/v1/chat/completions", json=body)).json()["choices"]
    told = choice["expert_choices"]
    assert told["prompt"]["tokens"][0] == "<s>"
    assert "hi" in "".join(told["prompt"]["tokens"])
    assert len(told["prompt"]["experts"]) == len(shard.requests[0].prompt_token_ids)
    assert told["completion"]["experts"][-1] is None


async def test_an_answer_that_was_not_asked_for_them_has_none(
    moe_folder: Path, byte_level: Tokenizer
) -> None:
    def script(request: GenerateRequest) -> Sequence[Step]:
        assert not request.return_expert_choices
        delta = GenerationDelta(index=0, token_ids=(7,), finish_reason="length")
        return [(delta,)]

    async with client_of(FakeShard(script), moe_folder) as client:
        response = await client.post("/v1/completions", json={"prompt": [5], "max_tokens": 1})
    assert "expert_choices" not in response.json()["choices"][0]


@pytest.mark.parametrize(
    ("shape", "body", "what"),
    [
        ({}, {"stream": True}, "stream=true"),
        ({"num_hidden_layers": 3000}, {"max_tokens": 173, "n": 1}, "limit is 1048576"),
        ({"num_hidden_layers": 3000}, {"max_tokens": 86, "n": 2}, "limit is 1048576"),
    ],
)
async def test_what_cannot_be_told_is_refused(
    byte_level: Tokenizer, tmp_path: Path, shape: dict[str, Any], body: dict[str, Any], what: str
) -> None:
    folder = write_model_folder(tmp_path / "moe", byte_level, **shape)
    shard = FakeShard(lambda _: [])
    asked = {"prompt": [5, 6], "return_expert_choices": True} | body
    async with client_of(shard, folder) as client:
        response = await client.post("/v1/completions", json=asked)
    assert response.status_code == 400
    error = error_of(response)
    assert what in error["message"]
    assert error["param"] == "return_expert_choices"
    assert not shard.requests
