"""The gateway under uvicorn on a loopback port, over a scripted shard: the stock OpenAI client,
raw sockets that hang up, and slow readers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import openai
import pytest
import uvicorn
from tokenizers import Tokenizer

from services.core.errors import OverloadedError, UnavailableError
from services.core.generation import GenerateRequest, GenerationDelta, TokenLogprob
from services.core.settings import load_settings
from services.gateway.app import create_app
from tests.support.fake_shard import FakeShard, Step, repeats, says
from tests.unit.gateway.tiny_models import train_byte_level, write_model_folder

DEADLINE_S = 60.0
MESSAGES: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_byte_level()


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(
        tmp_path_factory.mktemp("models") / "tiny", tokenizer, max_position_embeddings=65536
    )


@asynccontextmanager
async def serving(shard: FakeShard, folder: Path, **settings: object) -> AsyncIterator[int]:
    """The port of a running gateway."""
    app = create_app(load_settings(model="org/tiny", **settings), shard, None, model_folder=folder)
    config = uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    started = asyncio.Event()
    startup = server.startup

    async def startup_then_tell(sockets: list[object] | None = None) -> None:
        await startup(sockets)  # type: ignore[arg-type]
        started.set()

    server.startup = startup_then_tell  # type: ignore[method-assign,assignment]
    task = asyncio.create_task(server.serve())
    async with asyncio.timeout(DEADLINE_S):
        await started.wait()
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        async with asyncio.timeout(DEADLINE_S):
            await task


@asynccontextmanager
async def openai_client(
    shard: FakeShard, folder: Path, **settings: object
) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        serving(shard, folder, **settings) as port,
        openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="k", max_retries=0, timeout=DEADLINE_S
        ) as client,
    ):
        yield client


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    token_ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return token_ids


def with_logprobs(token_ids: Sequence[int]) -> list[TokenLogprob]:
    return [TokenLogprob(token_id=t, logprob=-0.5, top=((t, -0.5), (2, -4.0))) for t in token_ids]


async def test_the_openai_client_completes_and_streams(folder: Path, tokenizer: Tokenizer) -> None:
    token_ids = encode(tokenizer, " brown 🦊 fox")
    shard = FakeShard(lambda _: says(token_ids, logprobs=with_logprobs(token_ids)))
    async with openai_client(shard, folder) as client:
        assert [model.id async for model in client.models.list()] == ["tiny"]
        assert (await client.models.retrieve("tiny")).id == "tiny"
        whole = await client.completions.create(
            model="tiny", prompt="The quick", logprobs=2, seed=1, stop=["\n"], max_tokens=32
        )
        stream = await client.completions.create(
            model="tiny", prompt="The quick", stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert whole.choices[0].text == " brown 🦊 fox"
    assert whole.choices[0].finish_reason == "stop"
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens is not None
    assert logprobs.token_logprobs == [-0.5] * len(token_ids)
    assert logprobs.top_logprobs is not None and logprobs.top_logprobs[0]["</s>"] == -4.0
    assert whole.usage is not None and whole.usage.completion_tokens == len(token_ids)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == " brown 🦊 fox"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


async def test_the_openai_client_chats_and_streams(folder: Path, tokenizer: Tokenizer) -> None:
    token_ids = encode(tokenizer, "quick 🦊")

    def script(request: GenerateRequest) -> Sequence[Step]:
        logprobs = with_logprobs(token_ids) if request.sampling.logprobs is not None else None
        steps = [
            says(token_ids, index=i, logprobs=logprobs, num_cached_tokens=4)
            for i in range(request.n)
        ]
        return [step for choice in steps for step in choice]

    shard = FakeShard(script)
    async with openai_client(shard, folder) as client:
        whole = await client.chat.completions.create(
            model="tiny", messages=MESSAGES, n=2, logprobs=True, top_logprobs=2, user="me"
        )
        stream = await client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"session_id": "s-1", "top_k": 3},
        )
        chunks = [chunk async for chunk in stream]
        async with client.chat.completions.stream(model="tiny", messages=MESSAGES) as helper:
            final = await helper.get_final_completion()
    assert [choice.message.content for choice in whole.choices] == ["quick 🦊"] * 2
    logprobs = whole.choices[1].logprobs
    assert logprobs is not None and logprobs.content is not None
    content = logprobs.content
    assert len(content) == len(token_ids)
    assert content[0].top_logprobs[1].token == "</s>"
    assert whole.usage is not None and whole.usage.prompt_tokens_details is not None
    assert whole.usage.prompt_tokens_details.cached_tokens == 4
    assert chunks[0].choices[0].delta.role == "assistant"
    deltas = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(deltas) == "quick 🦊"
    assert chunks[-1].usage is not None
    assert shard.requests[1].session_id == "s-1" and shard.requests[1].sampling.top_k == 3
    assert final.choices[0].message.content == "quick 🦊"


async def test_the_openai_client_raises_its_own_errors(folder: Path, tokenizer: Tokenizer) -> None:
    token_ids = encode(tokenizer, "fox")
    shard = FakeShard(lambda _: [OverloadedError("2000 tokens wait", retry_after_s=7)])
    async with openai_client(shard, folder) as client:
        with pytest.raises(openai.NotFoundError) as not_found:
            await client.completions.create(model="gpt-4", prompt="x")
        assert not_found.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as bad:
            await client.completions.create(model="tiny", prompt="x", temperature=3)
        assert bad.value.param == "temperature"
        with pytest.raises(openai.RateLimitError) as limited:
            await client.completions.create(model="tiny", prompt="x", stream=True)
        assert limited.value.response.headers["retry-after"] == "7"
        shard.script = lambda _: [*says(token_ids)[:-1], UnavailableError("the shard is gone")]
        stream = await client.completions.create(model="tiny", prompt="x", stream=True)
        seen = ""
        with pytest.raises(openai.APIError, match="the shard is gone"):
            async for chunk in stream:
                seen += chunk.choices[0].text
        assert seen == "fox"
    async with openai_client(shard, folder, api_keys="other") as client:
        with pytest.raises(openai.AuthenticationError):
            await client.models.list()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_hangs_up_aborts_the_shards_work(
    folder: Path, tokenizer: Tokenizer, stream: bool
) -> None:
    never = asyncio.Event()
    shard = FakeShard(lambda _: [*says(encode(tokenizer, "quick brown"))[:-1], never])
    async with serving(shard, folder) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post("/v1/completions", {"prompt": "x", "stream": stream}))
        async with asyncio.timeout(DEADLINE_S):
            await shard.started.wait()
            if stream:
                await reader.readuntil(b"data: ")
            assert not shard.closed.is_set()
            writer.transport.abort()
            await shard.closed.wait()  # nothing else could end it: its answer never does
    assert shard.num_aborted == 1


async def test_a_reader_that_does_not_read_holds_the_shard_back(
    folder: Path, tokenizer: Tokenizer
) -> None:
    (token_id,) = encode(tokenizer, "x")
    num_given = 0

    def script(_: GenerateRequest) -> Sequence[Step]:
        return Counted()

    class Counted(Sequence[Step]):
        def __len__(self) -> int:
            return 60_000

        def __getitem__(self, position: int) -> Step:  # type: ignore[override]
            nonlocal num_given
            if position >= len(self):
                raise IndexError
            num_given = position
            return (GenerationDelta(index=0, token_ids=(token_id,)),)

    shard = FakeShard(script)
    async with serving(shard, folder) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        body = {"prompt": "x", "stream": True, "max_tokens": 60_000}
        writer.write(post("/v1/completions", body))
        async with asyncio.timeout(DEADLINE_S):
            before = -1
            while num_given != before or num_given == 0:
                before = num_given
                await asyncio.sleep(0.2)  # a standstill has no event to wait for
        assert num_given < 59_000
        writer.transport.abort()
        async with asyncio.timeout(DEADLINE_S):
            await shard.closed.wait()
        del reader


async def test_a_body_that_goes_on_past_the_limit_is_refused_while_it_is_sent(
    folder: Path,
) -> None:
    shard = FakeShard(repeats([9]))
    async with serving(shard, folder, max_body_bytes=65536) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        writer.write(head.encode() + b"transfer-encoding: chunked\r\n\r\n")
        piece = b"4000\r\n" + b" " * 0x4000 + b"\r\n"
        async with asyncio.timeout(DEADLINE_S):
            for _ in range(8):
                writer.write(piece)
                await writer.drain()
            status = await reader.readline()
        writer.transport.abort()
    assert b" 413 " in status


def post(path: str, body: dict[str, object]) -> bytes:
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: gateway\r\ncontent-type: application/json\r\n"
        f"content-length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content
