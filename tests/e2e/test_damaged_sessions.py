"""A session's blocks outlive every shard, and damaged ones are computed anew, not used."""

from __future__ import annotations

import os
import signal

import openai
import pytest
import redis

from services.core.kernels.library import native_library
from services.core.model_config import load_model_config
from services.sessions.block_codec import HEADER_BYTES, encode_block
from services.sessions.store import BlockLayout
from tests.support.product import DEMO_MODEL, Product
from tests.support.waiting import wait_until


@pytest.mark.timeout(300)
def test_a_session_survives_the_loss_of_all_shards_and_damage_to_its_blocks(
    product: Product, client: openai.OpenAI, demo: str, long_python: str
) -> None:
    prompt = _prompt_of_tokens(client, demo, long_python, 1500)

    def ask(session: str | None) -> tuple[str, int, int]:
        """Text, tokens that were cached, and those of them that came from the store."""
        answer = client.completions.create(
            model=demo,
            prompt=prompt,
            max_tokens=32,
            temperature=0,
            extra_body={"session_id": session} if session else {},
        )
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        details = answer.usage.prompt_tokens_details
        restored = (details.model_extra or {}).get("restored_tokens", 0)
        return answer.choices[0].text, details.cached_tokens or 0, restored

    store = redis.Redis.from_url(_store_url(product))
    text, _, _ = ask("long")
    wait_until(lambda: _num_whole_blocks(store) >= 90, timeout_s=20, what="written behind")
    session = client.get("/sessions/long", cast_to=object)
    assert session["num_blocks"] >= 90  # type: ignore[index]

    _restart_shards(product)
    again, cached, restored = ask("long")
    assert again == text
    assert restored >= 1400
    assert cached >= restored

    for damage in (_flip_a_byte, _truncate, _take_from_another_model):
        _restart_shards(product)
        for key in store.scan_iter("expertfleet:*:kv:*"):
            damage(store, key)
        again, _, restored = ask("long")
        assert again == text, damage.__name__
        assert restored == 0, damage.__name__
        refused = product.metric(
            _shard_metrics(product), "expertfleet_session_refused_blocks_total"
        )
        assert refused >= 1, damage.__name__
        wait_until(lambda: _num_whole_blocks(store) >= 90, timeout_s=20, what="written again")

    client.delete("/sessions/long", cast_to=object)
    with pytest.raises(openai.NotFoundError):
        client.get("/sessions/long", cast_to=object)


def _prompt_of_tokens(client: openai.OpenAI, model: str, text: str, num_tokens: int) -> str:
    """A prefix of `text` of about `num_tokens` tokens, found by asking."""
    answer = client.completions.create(model=model, prompt=text[:2000], max_tokens=1)
    assert answer.usage is not None
    prompt = text[: int(2000 * num_tokens / answer.usage.prompt_tokens)]
    assert len(prompt) < len(text)
    return prompt


def _restart_shards(product: Product) -> None:
    before = {shard["pid"] for shard in product.experts()["shards"]}
    for pid in before:
        os.kill(pid, signal.SIGKILL)

    def replaced() -> bool:
        pids = {shard["pid"] for shard in product.experts()["shards"]}
        return bool(pids) and not pids & before and product.is_ready()

    wait_until(replaced, timeout_s=90, what="new shards")


def _shard_metrics(product: Product) -> str:
    return str(product.experts()["shards"][0]["metrics_endpoint"])


def _num_whole_blocks(store: redis.Redis) -> int:
    config = load_model_config(DEMO_MODEL)
    value_bytes = 2 if native_library() else 4
    whole_bytes = HEADER_BYTES + config.kv_bytes_per_token(value_bytes) * 16
    return sum(store.strlen(key) == whole_bytes for key in store.scan_iter("expertfleet:*:kv:*"))


def _store_url(product: Product) -> str:
    server = next(p for p in product.family() if "valkey" in p.name() or "redis" in p.name())
    command = server.cmdline()
    # The server rewrites its command line; its socket is the unix socket it listens on.
    sockets = [c.laddr for c in server.net_connections("unix") if c.laddr]
    assert sockets, command
    return f"unix://{sockets[0]}"


def _flip_a_byte(store: redis.Redis, key: bytes) -> None:
    value = bytearray(store.get(key) or b"\0")  # type: ignore[arg-type]
    value[len(value) // 2] ^= 0xFF
    store.set(key, bytes(value), keepttl=True)


def _truncate(store: redis.Redis, key: bytes) -> None:
    value = bytes(store.get(key) or b"")  # type: ignore[arg-type]
    store.set(key, value[: len(value) // 2], keepttl=True)


def _take_from_another_model(store: redis.Redis, key: bytes) -> None:
    """A whole and valid block, but of another model: only the header's fingerprint tells."""
    config = load_model_config(DEMO_MODEL)
    other = BlockLayout(
        model_fingerprint=b"another model...",
        num_layers=config.num_hidden_layers,
        block_size=16,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        dtype="bfloat16" if native_library() else "float32",
    )
    payload = bytes(store.get(key) or b"")[HEADER_BYTES:]  # type: ignore[arg-type]
    block_hash = bytes.fromhex(key.decode().rsplit(":", 1)[1])
    store.set(key, encode_block(other, block_hash, payload), keepttl=True)
