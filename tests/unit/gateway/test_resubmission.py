"""A client must not notice that its shard was lost: the same bytes come from the next one."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry
from tokenizers import Tokenizer

from services.core import telemetry
from services.core.errors import (
    ContextLengthError,
    ExpertUnavailableError,
    InvalidRequestError,
    LossReason,
    NonFiniteError,
    OverloadedError,
    ShardLostError,
    UnavailableError,
)
from services.core.generation import (
    GenerateRequest,
    GenerationDelta,
    ResumedChoice,
    SamplingParams,
    TokenLogprob,
)
from services.core.settings import load_settings
from services.gateway.app import create_app
from services.gateway.resubmission import (
    MAX_DEATHS,
    EmittedTokens,
    Losses,
    Resubmission,
    ResubmittingShards,
)
from tests.support.eventually import eventually
from tests.support.fake_shard import FakeShard, Script, Step, dying, says
from tests.unit.gateway.http import client_of, encode, error_of

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": (COMPLETIONS, {"prompt": "x", "temperature": 0}),
    "seeded": (COMPLETIONS, {"prompt": "x", "seed": 7}),
    "two choices": (COMPLETIONS, {"prompt": "x", "n": 2}),
    "a stop string over the cut": (COMPLETIONS, {"prompt": "x", "n": 2, "stop": [" 🦊 jum"]}),
    "log-probabilities": (COMPLETIONS, {"prompt": "x", "logprobs": 1}),
    "token ids and echo": (COMPLETIONS, {"prompt": "x", "return_token_ids": True, "echo": True}),
    "chat": (CHAT, {"messages": [{"role": "user", "content": "x"}]}),
    "chat with log-probabilities": (
        CHAT,
        {
            "messages": [{"role": "user", "content": "x"}],
            "logprobs": True,
            "top_logprobs": 2,
            "n": 2,
        },
    ),
}
DIED = ShardLostError("the shard died")


def script_of(tokenizer: Tokenizer) -> Script:
    """Two choices of unequal lengths, told token by token; a character spans several tokens."""
    texts = ("the 🦊 jumps", "quick brown 🦊 fox over")

    def script(request: GenerateRequest) -> Sequence[Step]:
        columns = []
        for index in range(request.n):
            token_ids = encode(tokenizer, texts[index])
            logprobs = None
            if request.sampling.logprobs is not None:
                logprobs = [
                    TokenLogprob(token_id=token_id, logprob=-0.1 * place, top=((token_id, -0.1),))
                    for place, token_id in enumerate(token_ids)
                ]
            # What another shard would have found cached is no affair of the client.
            told = says(
                token_ids,
                index=index,
                logprobs=logprobs,
                num_cached_tokens=9 if request.resumed and any(_tokens(request)) else 1,
            )
            columns.append(told)
        length = max(map(len, columns))
        return [
            tuple(delta for told in columns if place < len(told) for delta in told[place])
            for place in range(length)
        ]

    return script


def _tokens(request: GenerateRequest) -> list[int]:
    return [len(choice.token_ids) for choice in request.resumed]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("case", CASES)
async def test_a_shard_lost_at_any_token_is_not_seen_in_the_answer(
    model_folder: Path, byte_level: Tokenizer, case: str, stream: bool
) -> None:
    url, body = CASES[case]
    body = body | {"max_tokens": 64, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    script = script_of(byte_level)
    shard = FakeShard(script)
    async with client_of(shard, model_folder) as client:
        expected = _timeless((await client.post(url, json=body)).text)
        num_steps = len(script(shard.requests[0]))
        for cut in range(num_steps):
            for error in (DIED, None):
                shard.script = dying(script, after=[cut], error=error)
                shard.requests.clear()
                answer = await client.post(url, json=body)
                assert _timeless(answer.text) == expected, f"cut after {cut} steps"
    assert "🦊" in expected or "stop" in body


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_shards_may_be_lost_again_and_again_as_long_as_tokens_come(
    model_folder: Path, byte_level: Tokenizer, stream: bool
) -> None:
    script = script_of(byte_level)
    shard = FakeShard(script)
    body = {"prompt": "x", "n": 2, "max_tokens": 64, "stream": stream}
    async with client_of(shard, model_folder) as client:
        expected = _timeless((await client.post(COMPLETIONS, json=body)).text)
        num_steps = len(script(shard.requests[0]))
        shard.script = dying(script, after=range(1, num_steps), error=DIED)
        answer = await client.post(COMPLETIONS, json=body)
    assert _timeless(answer.text) == expected
    assert len(shard.requests) == 1 + num_steps


async def test_what_is_sent_again_is_the_same_request_and_what_was_emitted(
    model_folder: Path, byte_level: Tokenizer
) -> None:
    script = script_of(byte_level)
    first, second = (
        encode(byte_level, "the 🦊 jumps"),
        encode(byte_level, "quick brown 🦊 fox over"),
    )
    cut = len(first) + 1  # the first choice has ended
    shard = FakeShard(dying(script, after=[2, cut], error=DIED))
    body = {"prompt": "x", "n": 2, "max_tokens": 64, "session_id": "s", "min_tokens": 3}
    async with client_of(shard, model_folder) as client:
        assert (await client.post(COMPLETIONS, json=body)).status_code == 200
    original, again, last = shard.requests
    assert original.resumed == ()
    assert original.sampling.seed is not None, "drawn by the gateway, as the client gave none"
    for request in (again, last):
        assert request.request_id == original.request_id
        assert request.sampling == original.sampling
        assert (request.session_id, request.n) == ("s", 2)
        assert request.prompt_token_ids == original.prompt_token_ids
    assert again.resumed == (
        ResumedChoice(token_ids=tuple(first[:2])),
        ResumedChoice(token_ids=tuple(second[:2])),
    )
    assert last.resumed == (
        ResumedChoice(is_finished=True),
        ResumedChoice(token_ids=tuple(second[:cut])),
    )


async def test_a_choice_that_a_stop_string_ended_is_not_resumed(
    model_folder: Path, byte_level: Tokenizer
) -> None:
    script = script_of(byte_level)
    num_fox = len(encode(byte_level, "the 🦊"))
    shard = FakeShard(dying(script, after=[num_fox + 1], error=DIED))
    body = {"prompt": "x", "n": 2, "max_tokens": 64, "stop": ["the 🦊"]}
    async with client_of(shard, model_folder) as client:
        answer = (await client.post(COMPLETIONS, json=body)).json()
    assert [choice["text"] for choice in answer["choices"]] == ["", "quick brown 🦊 fox over"]
    assert shard.requests[1].resumed[0].is_finished


async def test_every_prompt_of_a_request_is_resumed_by_itself(
    model_folder: Path, byte_level: Tokenizer
) -> None:
    script = script_of(byte_level)
    shard = FakeShard(dying(script, after=[3, 1, 4], error=DIED))
    async with client_of(shard, model_folder) as client:
        body = {"prompt": [[5], [6]], "n": 2, "max_tokens": 64}
        answer = (await client.post(COMPLETIONS, json=body)).json()
    texts = ["the 🦊 jumps", "quick brown 🦊 fox over"] * 2
    assert [choice["text"] for choice in answer["choices"]] == texts
    assert len(shard.requests) == 5


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequestError("wrong", param="prompt"),
        ContextLengthError("too long", param="prompt"),
        OverloadedError("full"),
        ExpertUnavailableError("no replica of expert 3"),
        NonFiniteError("NaN"),
        UnavailableError("not now"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("num_steps", [0, 2])
async def test_other_errors_are_not_sent_again(
    model_folder: Path, byte_level: Tokenizer, error: Exception, num_steps: int
) -> None:
    shard = FakeShard(dying(script_of(byte_level), after=[num_steps], error=error))
    async with client_of(shard, model_folder) as client:
        answer = await client.post(COMPLETIONS, json={"prompt": "x", "max_tokens": 64})
    assert error_of(answer)["message"] == str(error)
    assert len(shard.requests) == 1


async def test_where_there_is_no_other_shard_nothing_is_sent_again(
    model_folder: Path, byte_level: Tokenizer
) -> None:
    shard = FakeShard(dying(script_of(byte_level), after=[2], error=DIED))
    async with client_of(shard, model_folder, shard_wait_s=0.0) as client:
        answer = await client.post(COMPLETIONS, json={"prompt": "x", "max_tokens": 64})
    assert answer.status_code == 503
    assert error_of(answer)["code"] == "shard_lost"
    assert len(shard.requests) == 1


async def test_a_request_on_which_shards_die_is_given_up_with_a_clear_error(
    model_folder: Path,
) -> None:
    shard = FakeShard(lambda _: [DIED])
    async with client_of(shard, model_folder) as client:
        answer = await client.post(COMPLETIONS, json={"prompt": "x"})
    assert answer.status_code == 503
    assert "3 attention shards were lost" in error_of(answer)["message"]
    assert len(shard.requests) == MAX_DEATHS


async def test_the_loss_is_in_the_metrics_and_in_the_requests_own_trace(
    model_folder: Path, byte_level: Tokenizer
) -> None:
    spans = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    drained = ShardLostError("going", reason="drained")
    shard = FakeShard(dying(script_of(byte_level), after=[2], error=drained))
    registry = CollectorRegistry()
    app = create_app(
        load_settings(model="org/tiny"),
        shard,
        None,
        model_folder=model_folder,
        tracer=provider.get_tracer("test"),
        metrics_registry=registry,
    )
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        await client.post(COMPLETIONS, json={"prompt": "x", "max_tokens": 64})
    (span,) = spans.get_finished_spans()
    (event,) = span.events
    assert event.name == telemetry.EVENT_RESUBMITTED
    assert dict(event.attributes or {}) == {
        telemetry.ATTR_ATTEMPT: 1,
        telemetry.ATTR_LOSS_REASON: "drained",
        telemetry.ATTR_NUM_TOKENS: 2,
    }
    first, second = shard.requests
    assert first.trace_context == second.trace_context != {}
    assert registry.get_sample_value(telemetry.METRIC_RESUBMISSIONS, {"reason": "drained"}) == 1


def new_losses() -> Losses:
    return Losses(shard_wait_s=60.0)


def test_the_first_loss_is_followed_up_at_once_and_later_ones_after_growing_pauses() -> None:
    losses = new_losses()
    error = ShardLostError("none there", reason="unreachable")
    pauses = [losses.lost(error, sent_at=0.0, now=0.0) for _ in range(8)]
    assert pauses == [0.0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    losses.progressed()
    assert losses.lost(error, sent_at=0.0, now=0.0) == 0.0


def test_a_request_waits_for_a_shard_for_a_bounded_time() -> None:
    losses = new_losses()
    error = ShardLostError("none there", reason="unreachable")
    losses.lost(error, sent_at=100.0, now=100.0)
    losses.lost(ShardLostError("going", reason="drained"), sent_at=159.0, now=159.9)
    with pytest.raises(UnavailableError, match="within 60 s"):
        losses.lost(error, sent_at=160.0, now=160.0)


def test_the_time_that_a_shard_had_the_request_is_no_waiting() -> None:
    losses = new_losses()
    losses.lost(ShardLostError("none", reason="unreachable"), sent_at=0.0, now=50.0)
    losses.lost(DIED, sent_at=51.0, now=500.0)
    losses.lost(ShardLostError("none", reason="unreachable"), sent_at=501.0, now=540.0)
    with pytest.raises(UnavailableError, match="within 60 s"):
        losses.lost(ShardLostError("none", reason="unreachable"), sent_at=541.0, now=561.0)


@pytest.mark.parametrize("reason", ["drained", "hung"])
def test_a_request_that_its_shard_had_for_long_goes_on_when_the_shard_drains_or_hangs(
    reason: LossReason,
) -> None:
    losses = new_losses()
    losses.progressed()
    assert losses.lost(ShardLostError("gone", reason=reason), sent_at=0.0, now=500.0) == 0.0
    with pytest.raises(UnavailableError, match="within 60 s"):
        losses.lost(ShardLostError("gone", reason=reason), sent_at=501.0, now=560.0)


class Hospital:
    """Shards that a poison request ends, and with itself all requests that are there with it."""

    def __init__(self) -> None:
        self.num_deaths = 0
        self._death = asyncio.Event()

    async def generate(self, request: GenerateRequest) -> Any:
        death = self._death
        if request.prompt_token_ids == (666,):
            await asyncio.sleep(0.01)
            self.num_deaths += 1
            death.set()
            self._death = asyncio.Event()
        try:
            async with asyncio.timeout(0.03):
                await death.wait()
        except TimeoutError:
            yield (GenerationDelta(index=0, token_ids=(5,), finish_reason="length"),)
        else:
            raise ShardLostError("killed", reason="died")


async def test_a_poisonous_request_ends_few_shards_and_takes_no_other_request_with_it() -> None:
    hospital = Hospital()
    shards = ResubmittingShards(hospital, shard_wait_s=60.0)  # type: ignore[arg-type]

    async def ask(token_id: int) -> int:
        request = GenerateRequest(
            request_id=str(token_id),
            prompt_token_ids=(token_id,),
            sampling=SamplingParams(max_tokens=1, seed=1),
        )
        seen: list[Resubmission] = []
        async for _ in shards.generate(request, EmittedTokens(1), seen.append):
            pass
        return len(seen)

    asked = [asyncio.create_task(ask(token_id)) for token_id in (1, 2, 666, 3, 4, 666, 5)]
    outcomes = await asyncio.gather(*asked, return_exceptions=True)
    poisoned = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    assert [type(error) for error in poisoned] == [UnavailableError] * 2
    assert len(outcomes) - len(poisoned) == 5
    assert hospital.num_deaths <= 2 * MAX_DEATHS


async def test_closing_ends_a_request_that_waits_to_be_sent_again(
    model_folder: Path,
) -> None:
    shard = FakeShard(lambda _: [ShardLostError("none", reason="unreachable")])
    shards = ResubmittingShards(shard, shard_wait_s=60.0)
    request = GenerateRequest(
        request_id="r", prompt_token_ids=(1,), sampling=SamplingParams(max_tokens=1, seed=1)
    )
    seen: list[Resubmission] = []
    stream = shards.generate(request, EmittedTokens(1), seen.append)
    reading = asyncio.ensure_future(anext(stream))
    await eventually(lambda: len(shard.requests) >= 4)
    assert len(seen) == 1, "waiting for a shard is told of once"
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    assert shard.num_closed == len(shard.requests)


def _timeless(text: str) -> str:
    """An answer without what differs from one request to the next."""
    text = re.sub(r'"id":"[^"]+"', '"id":"?"', text)
    return re.sub(r'"created":\d+', '"created":0', text)
