"""More than one attention shard: sessions stick to theirs, and load brings a second one."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support.product import Product
from tests.support.waiting import wait_until

SESSION = "sticky"


@pytest.fixture(scope="module")
def scaling_product(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Product]:
    """One to two shards with experts in process, two sequences each, so that work waits."""
    started = Product(
        tmp_path_factory.mktemp("shards") / "state",
        "--no-workers",
        "--shards",
        "1-2",
        environment={"EXPERTFLEET_MAX_NUM_SEQS": "2"},
    ).start()
    try:
        yield started
    finally:
        started.stop()


@pytest.mark.timeout(600)
def test_waiting_tokens_bring_a_second_shard_and_sessions_stick_to_theirs(
    scaling_product: Product,
) -> None:
    product = scaling_product
    assert len(_shards(product)) == 1
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        load = [pool.submit(_ask, product, _long_prompt(n), 160, None) for n in range(24)]
        wait_until(lambda: len(_shards(product)) == 2, timeout_s=240, what="a second shard")
        answers = [future.result() for future in load]
    assert all(answer["choices"][0]["finish_reason"] == "length" for answer in answers)

    # A shard's lease is there before requests are routed to it, and a session moves to a new shard.
    num_asked = 24 * 160 + _ask_until_all_answer(product)
    before = _generated_in_all(product, num_asked)
    for turn in range(6):
        _ask(product, f"def turn_{turn}():\n", 8, SESSION)
    after = _generated_in_all(product, num_asked + 48)
    gained = {shard: count - before.get(shard, 0) for shard, count in after.items()}
    assert sorted(gained.values()) == [0, 48]


def test_ctrl_c_ends_everything_within_ten_seconds(scaling_product: Product) -> None:
    """Ray with two shards; the last test of this file."""
    scaling_product.check_ctrl_c()


def _ask_until_all_answer(product: Product) -> int:
    """Ask for single tokens until every shard has given some; returns how many were asked for."""
    num_asked = 0

    def have_all_answered() -> bool:
        nonlocal num_asked
        if all(_generated(product).values()):
            return True
        _ask(product, "def", 1, None)
        num_asked += 1
        return False

    wait_until(have_all_answered, what="tokens from every shard")
    return num_asked


def _long_prompt(number: int) -> list[int]:
    return [10 + (number * 7919 + index * 31) % 1900 for index in range(1500)]


def _ask(
    product: Product, prompt: str | list[int], max_tokens: int, session: str | None
) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": "demo",
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    if session is not None:
        body["session_id"] = session
    response = httpx.post(f"{product.url}/v1/completions", json=body, timeout=480)
    return dict(response.raise_for_status().json())


def _shards(product: Product) -> list[dict[str, Any]]:
    return list(product.experts()["shards"])


def _generated(product: Product) -> dict[str, int]:
    return {shard["shard_id"]: shard["num_generated_tokens"] for shard in _shards(product)}


def _generated_in_all(product: Product, num_tokens: int) -> dict[str, int]:
    """By shard, in the reading of the leases in which they first tell of so many tokens."""
    readings: list[dict[str, int]] = []

    def tell_of_all() -> bool:
        readings.append(_generated(product))
        return sum(readings[-1].values()) == num_tokens

    wait_until(tell_of_all, what=f"leases that tell of {num_tokens} tokens")
    return readings[-1]
