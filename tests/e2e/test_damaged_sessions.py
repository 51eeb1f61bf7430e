"""A session's blocks outlive every shard, and damaged ones are computed anew, not used."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import openai
import pytest
import redis

from services.core.kernels.library import native_library
from services.core.model_config import load_model_config
from services.sessions.block_codec import HEADER_BYTES, encode_block
from services.sessions.store import BlockLayout
from tests.support.product import DEMO_MODEL, Product
from tests.support.waiting import wait_until

NUM_BLOCKS = 60
Damage = Callable[[redis.Redis, bytes], None]


@pytest.mark.timeout(600)
def test_sessions_survive_the_loss_of_all_shards_and_damage_to_their_blocks(
    product: Product, client: openai.OpenAI, demo: str, long_python: str
) -> None:
    """Four sessions, one of which stays sound, and each other suffers damage of one kind."""
    damages: list[Damage | None] = [None, _flip_a_byte, _truncate, _take_from_another_model]
    prompt = _prompt_of_tokens(client, demo, long_python, NUM_BLOCKS * 16)

    def ask(number: int) -> tuple[str, int, int]:
        """Text, tokens that were cached, and those of them that came from the store."""
        answer = client.completions.create(
            model=demo,
            prompt=f"# {number}\n{prompt}",
            max_tokens=32,
            temperature=0,
            extra_body={"session_id": f"long-{number}"},
        )
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        details = answer.usage.prompt_tokens_details
        restored = (details.model_extra or {}).get("restored_tokens", 0)
        return answer.choices[0].text, details.cached_tokens or 0, restored

    store = redis.Redis.from_url(_store_url(product))
    texts: list[str] = []
    keys: list[set[bytes]] = []
    for number in range(len(damages)):
        before = _whole_blocks(store)
        texts.append(ask(number)[0])
        wait_until(
            lambda before=before: len(_whole_blocks(store) - before) >= NUM_BLOCKS,  # type: ignore[misc]
            what="written behind",
        )
        keys.append(_whole_blocks(store) - before)
        session = client.get(f"/sessions/long-{number}", cast_to=object)
        assert session["num_blocks"] >= NUM_BLOCKS  # type: ignore[index]

    _restart_shards(product)
    for damage, of_session in zip(damages, keys, strict=True):
        for key in of_session if damage else ():
            assert damage is not None
            damage(store, key)
    refused = 0.0
    for number, damage in enumerate(damages):
        text, cached, restored = ask(number)
        assert text == texts[number], damage
        if damage is None:
            assert restored >= (NUM_BLOCKS - 2) * 16
            assert cached >= restored
        else:
            assert restored == 0, damage
            before_refused, refused = refused, _num_refused(product)
            assert refused > before_refused, damage
        wait_until(
            lambda number=number: keys[number] <= _whole_blocks(store),  # type: ignore[misc]
            what=f"written again after {damage}",
        )

    client.delete("/sessions/long-0", cast_to=object)
    with pytest.raises(openai.NotFoundError):
        client.get("/sessions/long-0", cast_to=object)


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

    wait_until(replaced, what="new shards")


def _num_refused(product: Product) -> float:
    (shard,) = product.experts()["shards"]
    return product.metric(
        str(shard["metrics_endpoint"]), "expertfleet_session_refused_blocks_total"
    )


def _whole_blocks(store: redis.Redis) -> set[bytes]:
    """Keys of the blocks that have the length of a whole one."""
    config = load_model_config(DEMO_MODEL)
    value_bytes = 2 if native_library() else 4
    whole_bytes = HEADER_BYTES + config.kv_bytes_per_token(value_bytes) * 16
    found = store.scan_iter("expertfleet:*:kv:*")
    return {key for key in found if store.strlen(key) == whole_bytes}


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
