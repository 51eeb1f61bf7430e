"""The stock `openai` client against the started product, Ray and workers and all."""

from __future__ import annotations

import concurrent.futures
import math

import openai
import pytest
from openai.types.chat import ChatCompletionChunk

from tests.support.waiting import wait_until

PROMPT = "def read_lines(path):\n"


def test_the_model_is_listed(client: openai.OpenAI, demo: str) -> None:
    model = client.models.retrieve(demo)
    assert model.id == demo
    assert model.object == "model"


def test_a_greedy_completion_repeats_itself_and_counts_its_tokens(
    client: openai.OpenAI, demo: str
) -> None:
    answers = [
        client.completions.create(model=demo, prompt=PROMPT, max_tokens=24, temperature=0)
        for _ in range(2)
    ]
    assert answers[0].choices[0].text == answers[1].choices[0].text != ""
    usage = answers[0].usage
    assert usage is not None
    assert usage.completion_tokens <= 24
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_streaming_gives_the_same_text_in_pieces(client: openai.OpenAI, demo: str) -> None:
    whole = client.completions.create(model=demo, prompt=PROMPT, max_tokens=32, temperature=0)
    stream = client.completions.create(
        model=demo,
        prompt=PROMPT,
        max_tokens=32,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    pieces, usage = [], None
    for event in stream:
        pieces += [choice.text for choice in event.choices]
        usage = event.usage or usage
    assert "".join(pieces) == whole.choices[0].text
    assert len(pieces) > 3
    assert usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens  # type: ignore[union-attr]


def test_chat_streams_a_role_first_and_then_content(client: openai.OpenAI, demo: str) -> None:
    messages = [{"role": "user", "content": "Count the words of a file."}]
    stream = client.chat.completions.create(
        model=demo,
        messages=messages,  # type: ignore[arg-type]
        max_tokens=24,
        temperature=0,
        stream=True,
    )
    events: list[ChatCompletionChunk] = list(stream)  # type: ignore[arg-type]
    whole = client.chat.completions.create(
        model=demo,
        messages=messages,  # type: ignore[arg-type]
        max_tokens=24,
        temperature=0,
    )
    assert events[0].choices[0].delta.role == "assistant"
    text = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
    assert text == whole.choices[0].message.content != ""
    assert events[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_a_seed_repeats_a_drawn_completion_and_another_seed_does_not(
    client: openai.OpenAI, demo: str
) -> None:
    def draw(seed: int) -> str:
        answer = client.completions.create(
            model=demo, prompt=PROMPT, max_tokens=32, temperature=1.0, seed=seed
        )
        return answer.choices[0].text

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(1, 5)}) > 1


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI, demo: str) -> None:
    free = client.completions.create(model=demo, prompt=PROMPT, max_tokens=40, temperature=0)
    text = free.choices[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    held = client.completions.create(
        model=demo, prompt=PROMPT, max_tokens=40, temperature=0, stop=[stop]
    )
    assert held.choices[0].text == text[: text.index(stop)]
    assert held.choices[0].finish_reason == "stop"


def test_logprobs_belong_to_the_tokens_drawn(client: openai.OpenAI, demo: str) -> None:
    answer = client.completions.create(
        model=demo, prompt=PROMPT, max_tokens=8, temperature=0, logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert "".join(logprobs.tokens or []) == answer.choices[0].text
    for chosen, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert chosen == pytest.approx(max(top.values()))
        assert sum(math.exp(value) for value in top.values()) <= 1 + 1e-6


def test_chat_logprobs_have_the_clients_shape(client: openai.OpenAI, demo: str) -> None:
    answer = client.chat.completions.create(
        model=demo,
        messages=[{"role": "user", "content": "Open a socket."}],
        max_tokens=6,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert all(len(entry.top_logprobs) == 2 for entry in logprobs.content)


def test_n_completions_are_numbered_and_differ(client: openai.OpenAI, demo: str) -> None:
    answer = client.completions.create(
        model=demo, prompt=PROMPT, max_tokens=24, temperature=1.0, n=4, seed=7
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in answer.choices}) > 1


def test_token_ids_can_be_the_prompt(client: openai.OpenAI, demo: str) -> None:
    answer = client.completions.create(model=demo, prompt=[5, 6, 7, 8], max_tokens=4, temperature=0)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 4


@pytest.mark.parametrize(
    ("change", "expected", "word"),
    [
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
        ({"model": "nobody"}, openai.NotFoundError, "nobody"),
        ({"prompt": "a b " * 9000}, openai.BadRequestError, "4096"),
        ({"n": 0}, openai.BadRequestError, "n"),
    ],
)
def test_a_bad_request_is_told_what_was_wrong(
    client: openai.OpenAI,
    demo: str,
    change: dict[str, object],
    expected: type[openai.APIStatusError],
    word: str,
) -> None:
    body: dict[str, object] = {"model": demo, "prompt": PROMPT, "max_tokens": 4} | change
    with pytest.raises(expected) as caught:
        client.completions.create(**body)  # type: ignore[call-overload]
    assert word in str(caught.value.message)
    assert caught.value.type == "invalid_request_error"


def test_many_clients_at_once_get_what_each_would_get_alone(
    client: openai.OpenAI, demo: str
) -> None:
    prompts = [f"def handler_{number}(request):\n" for number in range(12)]

    def ask(prompt: str) -> str:
        answer = client.completions.create(model=demo, prompt=prompt, max_tokens=20, temperature=0)
        return answer.choices[0].text

    alone = [ask(prompt) for prompt in prompts]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        together = list(pool.map(ask, prompts))
    assert together == alone


def test_a_client_that_leaves_frees_its_blocks(client: openai.OpenAI, demo: str) -> None:
    stream = client.completions.create(
        model=demo,
        prompt=PROMPT,
        max_tokens=3000,
        temperature=1.0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    stream.close()
    wait_until(lambda: _num_running(client) == 0)


def _num_running(client: openai.OpenAI) -> int:
    shards = client.get("/experts", cast_to=object)["shards"]  # type: ignore[index]
    return sum(shard["num_running"] + shard["num_waiting"] for shard in shards)
