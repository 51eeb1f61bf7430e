from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from services.core.errors import OverloadedError, UnavailableError
from services.core.generation import GenerateRequest, TokenLogprob
from tests.support.fake_shard import FakeShard, Step, repeats, says
from tests.unit.gateway.http import client_of, encode, error_of, events_of

URL = "/v1/completions"


async def test_a_prompt_is_tokenised_generated_and_answered(
    model_folder: Path, byte_level: Tokenizer
) -> None:
    shard = FakeShard(repeats(encode(byte_level, " brown fox")))
    async with client_of(shard, model_folder) as client:
        response = await client.post(URL, json={"model": "tiny", "prompt": "The quick"})
    assert response.status_code == 200
    body = response.json()
    assert body["id"].startswith("cmpl-")
    assert (body["object"], body["model"]) == ("text_completion", "tiny")
    assert body["choices"] == [
        {"index": 0, "text": " brown fox", "logprobs": None, "finish_reason": "stop"}
    ]
    (request,) = shard.requests
    assert list(request.prompt_token_ids) == byte_level.encode("The quick").ids
    assert request.sampling.max_tokens == 16
    assert (request.n, request.tenant, request.session_id) == (1, "default", None)


async def test_every_sampling_field_reaches_the_shard(
    model_folder: Path, byte_level: Tokenizer
) -> None:
    shard = FakeShard(repeats(encode(byte_level, "fox")))
    fields: dict[str, Any] = {
        "max_tokens": 9,
        "min_tokens": 2,
        "temperature": 0,
        "top_k": 5,
        "top_p": 0.5,
        "min_p": 0.25,
        "repetition_penalty": 1.5,
        "presence_penalty": -1,
        "frequency_penalty": 2,
        "seed": -7,
        "stop_token_ids": [11, 12],
        "ignore_eos": True,
        "logit_bias": {"7": -100, "8": 1.5},
        "logprobs": 3,
    }
    body = {"prompt": [5, 6], "n": 1, **fields, "user": "someone", "session_id": "chat-1"}
    async with client_of(shard, model_folder) as client:
        response = await client.post(URL, json=body | {"session_ttl_s": 60, "logprobs": None})
        assert response.status_code == 200
    sampling = shard.requests[0].sampling
    expected = fields | {"stop_token_ids": (11, 12), "logit_bias": {7: -100, 8: 1.5}}
    expected["logprobs"] = None
    assert {name: getattr(sampling, name) for name in fields} == expected
    assert shard.requests[0].session_id == "chat-1"
    assert shard.requests[0].session_ttl_s == 60


async def test_several_prompts_and_choices_are_numbered_prompt_by_prompt(
    model_folder: Path, byte_level: Tokenizer
) -> None:
    def script(request: GenerateRequest) -> list[Step]:
        words = {7: ("zero", "one"), 8: ("two", "three")}[request.prompt_token_ids[0]]
        steps = [says(encode(byte_level, word), index=i) for i, word in enumerate(words)]
        return [*steps[1], *steps[0]]

    shard = FakeShard(script)
    async with client_of(shard, model_folder) as client:
        whole = await client.post(URL, json={"prompt": [[7], [8]], "n": 2})
        stream = await client.post(URL, json={"prompt": [[7], [8]], "n": 2, "stream": True})
    choices = whole.json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert [choice["text"] for choice in choices] == ["zero", "one", "two", "three"]
    assert whole.json()["usage"]["prompt_tokens"] == 2
    *events, done = events_of(stream)
    texts = ["", "", "", ""]
    for event in events:
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert (texts, done) == (["zero", "one", "two", "three"], "[DONE]")
    assert len({request.request_id for request in shard.requests}) == 4


async def test_a_stream_has_one_event_a_delta_and_ends_with_done(
    model_folder: Path, byte_level: Tokenizer
) -> None:
    token_ids = encode(byte_level, "quick brown 🦊 fox")
    shard = FakeShard(repeats(token_ids))
    body = {"prompt": "x", "stream": True, "max_tokens": 64}
    async with client_of(shard, model_folder) as client:
        *events, done = events_of(await client.post(URL, json=body))
    assert done == "[DONE]"
    assert {event["object"] for event in events} == {"text_completion"}
    assert len({event["id"] for event in events}) == 1
    assert all("usage" not in event for event in events)
    choices = [event["choices"][0] for event in events]
    assert "".join(choice["text"] for choice in choices) == "quick brown 🦊 fox"
    assert all("�" not in choice["text"] for choice in choices)
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]


async def test_usage_is_streamed_on_request_after_the_choices(
    model_folder: Path, byte_level: Tokenizer
) -> None:
    token_ids = encode(byte_level, "fox")
    shard = FakeShard(lambda _: says(token_ids, num_cached_tokens=2, num_restored_tokens=1))
    body = {"prompt": [5, 6, 7], "stream": True, "stream_options": {"include_usage": True}}
    async with client_of(shard, model_folder) as client:
        *events, last, _ = events_of(await client.post(URL, json=body))
    assert all(event["usage"] is None for event in events)
    assert last["choices"] == []
    assert last["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": len(token_ids),
        "total_tokens": 3 + len(token_ids),
        "prompt_tokens_details": {"cached_tokens": 2, "restored_tokens": 1},
    }


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_ends_its_choice_alone_and_then_the_shards_work(
    model_folder: Path, byte_level: Tokenizer, stream: bool
) -> None:
    first, second = encode(byte_level, "a fox b"), encode(byte_level, "quick jumps")

    def script(_: GenerateRequest) -> list[Step]:
        return [*says(first)[:-1], *says(second, index=1), *says(first)[:-1]]

    shard = FakeShard(script)
    body = {"prompt": "x", "n": 2, "stop": ["fox"], "stream": stream}
    async with client_of(shard, model_folder) as client:
        response = await client.post(URL, json=body)
    texts, reasons = ["", ""], [[], []]  # type: tuple[list[str], list[list[str]]]
    if stream:
        for event in events_of(response)[:-1]:
            choice = event["choices"][0]
            texts[choice["index"]] += choice["text"]
            if choice["finish_reason"]:
                reasons[choice["index"]].append(choice["finish_reason"])
    else:
        for choice in response.json()["choices"]:
            texts[choice["index"]] += choice["text"]
            reasons[choice["index"]].append(choice["finish_reason"])
    assert texts == ["a ", "quick jumps"]
    assert reasons == [["stop"], ["stop"]]
    assert shard.num_aborted == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_puts_the_prompt_before_every_choice(
    model_folder: Path, byte_level: Tokenizer, stream: bool
) -> None:
    shard = FakeShard(repeats(encode(byte_level, " fox")))
    prompts = [[1, *encode(byte_level, "The 🦊")], encode(byte_level, "quick")]
    body = {"prompt": prompts, "n": 2, "echo": True, "stream": stream}
    async with client_of(shard, model_folder) as client:
        response = await client.post(URL, json=body)
    texts = [""] * 4
    if stream:
        for event in events_of(response)[:-1]:
            texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    else:
        texts = [choice["text"] for choice in response.json()["choices"]]
    assert texts == ["The 🦊 fox"] * 2 + ["quick fox"] * 2


async def test_logprobs_have_openais_shape(model_folder: Path, byte_level: Tokenizer) -> None:
    token_ids = encode(byte_level, "fox 🦊")
    logprobs = [
        TokenLogprob(token_id=token_id, logprob=-1.5, top=((token_ids[0], -0.5), (2, -2.0)))
        for token_id in token_ids
    ]
    shard = FakeShard(lambda _: says(token_ids, logprobs=logprobs))
    async with client_of(shard, model_folder) as client:
        whole = await client.post(URL, json={"prompt": "x", "logprobs": 2})
        stream = await client.post(URL, json={"prompt": "x", "logprobs": 2, "stream": True})
    choice = whole.json()["choices"][0]
    told = choice["logprobs"]
    assert set(told) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert told["token_logprobs"] == [-1.5] * len(token_ids)
    first = told["tokens"][0]
    assert choice["text"].startswith(first)
    assert told["top_logprobs"][1][first] == -0.5
    assert told["top_logprobs"][1]["</s>"] == -2.0
    assert told["top_logprobs"][1][told["tokens"][1]] == -1.5
    fox_bytes = b"".join(
        bytes.fromhex(token.removeprefix("bytes:").replace("\\x", ""))
        for token in told["tokens"]
        if token.startswith("bytes:")
    )
    assert "🦊".encode().endswith(fox_bytes) and fox_bytes
    assert told["text_offset"][0] == 0
    assert told["text_offset"] == sorted(told["text_offset"])
    streamed: dict[str, list[Any]] = {key: [] for key in told}
    for event in events_of(stream)[:-1]:
        for key, values in (event["choices"][0]["logprobs"] or {}).items():
            streamed[key] += values
    assert streamed == told


@pytest.mark.parametrize("stream", [False, True])
async def test_without_a_tokenizer_token_ids_go_in_and_come_out(
    bare_model_folder: Path, stream: bool
) -> None:
    shard = FakeShard(repeats([9, 8, 7]))
    body = {"prompt": [5, 6], "return_token_ids": True, "stream": stream, "logprobs": None}
    async with client_of(shard, bare_model_folder) as client:
        response = await client.post(URL, json=body)
    if stream:
        choices = [event["choices"][0] for event in events_of(response)[:-1]]
    else:
        choices = response.json()["choices"]
    assert [token_id for choice in choices for token_id in choice["token_ids"]] == [9, 8, 7]
    assert "".join(choice["text"] for choice in choices) == ""


async def test_a_prompt_that_leaves_no_room_is_refused_with_the_numbers(
    model_folder: Path,
) -> None:
    shard = FakeShard(repeats([5]))
    async with client_of(shard, model_folder) as client:
        too_long = await client.post(URL, json={"prompt": [5] * 256})
        too_much = await client.post(URL, json={"prompt": [5] * 200, "max_tokens": 57})
        fits = await client.post(URL, json={"prompt": [5] * 200, "max_tokens": 56})
    for response, numbers in ((too_long, ("256",)), (too_much, ("256", "257", "200", "57"))):
        error = error_of(response)
        assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
        assert error["param"] == "prompt"
        assert all(number in error["message"] for number in numbers)
    assert fits.status_code == 200
    assert len(shard.requests) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_before_the_first_token_has_its_own_status(
    model_folder: Path, stream: bool
) -> None:
    shard = FakeShard(lambda _: [OverloadedError("2000 tokens wait", retry_after_s=2.5)])
    async with client_of(shard, model_folder) as client:
        response = await client.post(URL, json={"prompt": "x", "stream": stream})
    assert response.status_code == 429
    assert response.headers["retry-after"] == "3"
    assert error_of(response)["type"] == "rate_limit_error"
    assert shard.num_closed == 1


async def test_an_error_in_mid_stream_is_a_last_event(
    model_folder: Path, byte_level: Tokenizer
) -> None:
    token_ids = encode(byte_level, "fox")
    lost = UnavailableError("the shard is gone")
    shard = FakeShard(lambda _: [*says(token_ids)[:-1], lost])
    async with client_of(shard, model_folder) as client:
        response = await client.post(URL, json={"prompt": "x", "stream": True})
    *events, last = events_of(response)
    assert response.status_code == 200
    assert "".join(event["choices"][0]["text"] for event in events) == "fox"
    assert last["error"]["message"] == "the shard is gone"
    assert last["error"]["code"] == "unavailable"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_shard_that_ends_early_is_an_error_and_never_a_short_answer(
    model_folder: Path, byte_level: Tokenizer, stream: bool
) -> None:
    shard = FakeShard(lambda _: says(encode(byte_level, "fox"))[:-1])
    async with client_of(shard, model_folder) as client:
        response = await client.post(URL, json={"prompt": "x", "stream": stream})
    error = events_of(response)[-1]["error"] if stream else error_of(response)
    assert "before it was complete" in error["message"]


async def test_an_error_of_one_prompt_ends_the_others(model_folder: Path) -> None:
    def script(request: GenerateRequest) -> list[Step]:
        if request.prompt_token_ids[0] == 8:
            return [OverloadedError("full")]
        return [*says([5] * 50)]

    shard = FakeShard(script)
    async with client_of(shard, model_folder) as client:
        response = await client.post(URL, json={"prompt": [[7], [8], [9]], "max_tokens": 100})
    assert response.status_code == 429
    assert shard.num_closed == len(shard.requests)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_takes_too_long_is_ended(model_folder: Path, stream: bool) -> None:
    never = asyncio.Event()
    shard = FakeShard(lambda _: [*says([9])[:-1], never])
    async with client_of(shard, model_folder, request_timeout_s=0.1) as client:
        response = await client.post(URL, json={"prompt": "x", "stream": stream})
    error = events_of(response)[-1]["error"] if stream else error_of(response)
    assert error["code"] == "timeout"
    assert shard.num_aborted == 1
