from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from services.core.generation import TokenLogprob
from tests.support.fake_shard import FakeShard, repeats, says
from tests.unit.gateway.http import client_of, encode, error_of, events_of

URL = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hi"}]}


async def test_a_conversation_is_rendered_generated_and_answered(
    model_folder: Path, byte_level: Tokenizer
) -> None:
    shard = FakeShard(lambda _: says(encode(byte_level, "a fox"), num_cached_tokens=3))
    body: dict[str, Any] = {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}],
            },
        ],
    }
    async with client_of(shard, model_folder) as client:
        response = await client.post(URL, json=body)
    assert response.status_code == 200
    answer = response.json()
    assert answer["object"] == "chat.completion"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "a fox", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    (request,) = shard.requests
    expected = byte_level.encode(
        "<s><system>Be brief.<user>hi<assistant>", add_special_tokens=False
    ).ids
    assert list(request.prompt_token_ids) == expected
    assert request.sampling.max_tokens == 256 - len(expected)
    assert answer["usage"]["prompt_tokens"] == len(expected)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 3


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
async def test_the_limit_of_the_completion_has_two_names(model_folder: Path, field: str) -> None:
    shard = FakeShard(repeats([9]))
    async with client_of(shard, model_folder) as client:
        assert (await client.post(URL, json=HELLO | {field: 7})).status_code == 200
    assert shard.requests[0].sampling.max_tokens == 7


async def test_a_stream_names_the_role_first_and_the_reason_last(
    model_folder: Path, byte_level: Tokenizer
) -> None:
    shard = FakeShard(repeats(encode(byte_level, "quick fox")))
    body = HELLO | {"stream": True, "n": 2, "stream_options": {"include_usage": True}}
    async with client_of(shard, model_folder) as client:
        *events, usage, done = events_of(await client.post(URL, json=body))
    assert done == "[DONE]"
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] > 2
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    for index in (0, 1):
        mine = [e["choices"][0] for e in events if e["choices"][0]["index"] == index]
        first, *middle, last = mine
        assert first["delta"]["role"] == "assistant"
        assert "".join(choice["delta"]["content"] for choice in middle) == "quick fox"
        assert all(choice["finish_reason"] is None for choice in (first, *middle))
        assert (last["delta"], last["finish_reason"]) == ({}, "stop")


async def test_logprobs_list_every_token_with_its_bytes(
    model_folder: Path, byte_level: Tokenizer
) -> None:
    token_ids = encode(byte_level, "fox 🦊")
    logprobs = [
        TokenLogprob(token_id=token_id, logprob=-0.25, top=((token_id, -0.25), (2, -3.0)))
        for token_id in token_ids
    ]
    shard = FakeShard(lambda _: says(token_ids, logprobs=logprobs))
    body = HELLO | {"logprobs": True, "top_logprobs": 2}
    async with client_of(shard, model_folder) as client:
        whole = (await client.post(URL, json=body)).json()["choices"][0]
        stream = events_of(await client.post(URL, json=body | {"stream": True}))[:-1]
    content = whole["logprobs"]["content"]
    assert shard.requests[0].sampling.logprobs == 2
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == "fox 🦊"
    assert {entry["logprob"] for entry in content} == {-0.25}
    assert content[0]["top_logprobs"][1] == {
        "token": "</s>",
        "logprob": -3.0,
        "bytes": list(b"</s>"),
    }
    streamed = [
        entry
        for event in stream
        for entry in (event["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == content


async def test_logprobs_without_alternatives_ask_for_none(model_folder: Path) -> None:
    shard = FakeShard(lambda _: says([9], logprobs=[TokenLogprob(token_id=9, logprob=-1.0)]))
    async with client_of(shard, model_folder) as client:
        response = await client.post(URL, json=HELLO | {"logprobs": True})
    assert shard.requests[0].sampling.logprobs == 0
    assert response.json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "alloy"}}, "audio"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"no_such_field": 1}, "no_such_field"),
        ({"best_of": 2}, "best_of"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0]",
        ),
    ],
)
async def test_what_would_change_the_answer_and_is_not_served_is_refused(
    model_folder: Path, fields: dict[str, Any], param: str
) -> None:
    shard = FakeShard(repeats([9]))
    async with client_of(shard, model_folder) as client:
        response = await client.post(URL, json=HELLO | fields)
    error = error_of(response)
    assert (response.status_code, error["code"]) == (400, "unsupported_parameter")
    assert error["param"] == param and param.split("[")[0] in error["message"]
    assert shard.requests == []


async def test_what_changes_nothing_is_taken(model_folder: Path) -> None:
    fields: dict[str, Any] = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "prediction": {"type": "content", "content": "x"},
        "tools": [],
        "tool_choice": "none",
        "modalities": ["text"],
        "response_format": {"type": "text"},
        "n": None,
        "stop": None,
        "stream": False,
        "logit_bias": None,
    }
    async with client_of(FakeShard(repeats([9])), model_folder) as client:
        assert (await client.post(URL, json=HELLO | fields)).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 300}, "messages"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ["ok", ""]}, "stop[1]"),
        ({"stop": 5}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"640": 1}}, "logit_bias"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"session_id": "a/b"}, "session_id"),
        ({"session_ttl_s": 5}, "session_ttl_s"),
    ],
)
async def test_a_wrong_field_is_named(
    model_folder: Path, fields: dict[str, Any], param: str
) -> None:
    shard = FakeShard(repeats([9]))
    async with client_of(shard, model_folder) as client:
        response = await client.post(URL, json=HELLO | fields)
    error = error_of(response)
    assert (response.status_code, error["param"]) == (400, param)
    assert error["type"] == "invalid_request_error"
    assert shard.requests == []


async def test_the_session_comes_from_the_body_or_the_header(model_folder: Path) -> None:
    shard = FakeShard(repeats([9]))
    async with client_of(shard, model_folder) as client:

        async def session_of(in_body: str | None, in_header: str | None) -> str | None:
            body = HELLO if in_body is None else HELLO | {"session_id": in_body}
            headers = {} if in_header is None else {"X-Session-Id": in_header}
            response = await client.post(URL, json=body, headers=headers)
            if response.status_code != 200:
                return str(error_of(response)["param"])
            return shard.requests[-1].session_id

        assert await session_of(None, None) is None
        assert await session_of("a", None) == "a"
        assert await session_of(None, "b") == "b"
        assert await session_of("c", "c") == "c"
        assert await session_of("c", "d") == "session_id"
        assert await session_of(None, "not good") == "X-Session-Id"
