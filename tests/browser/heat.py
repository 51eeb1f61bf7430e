"""Load that heats one expert: one token over and over goes the same way every time."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import httpx
from playwright.sync_api import Locator, Page, expect

from tests.support.product import Product
from tests.support.waiting import wait_until

NUM_TOKENS = 256


def hot_cell(page: Page, product: Product, token_id: int) -> Locator:
    """The map's cell of the expert that most of a prompt of nothing but `token_id` goes to, by the
    engine. Returns once the page has seen that one prompt come and go: all of the map is cold."""
    before = _totals(product)
    (layer, expert), num_tokens = _hottest_slot(product.url, token_id)
    wait_until(
        lambda: _totals(product)[layer][expert] >= before[layer][expert] + num_tokens,
        timeout_s=60,
        what="the prompt in the workers' counts",
    )
    cell = page.locator(f'td.cell[data-layer="{layer}"][data-expert="{expert}"]')
    cell.click()  # its figures are shown
    total = f"{_totals(product)[layer][expert]:,}"
    expect(page.locator("#cell [data-figure=total]")).to_have_text(total)
    expect(page.locator("td.cell:not(.h0)")).to_have_count(0)
    return cell


def _totals(product: Product) -> list[list[int]]:
    view = httpx.get(f"{product.url}/v1/experts/view", timeout=30).raise_for_status().json()
    return [layer["tokens"] for layer in view["load"]["layers"]]


def _hottest_slot(url: str, token_id: int) -> tuple[tuple[int, int], int]:
    """(layer, expert), and how many of the prompt's tokens went there."""
    answer = httpx.post(
        f"{url}/v1/completions",
        json=_body(token_id) | {"return_expert_choices": True},
        timeout=120,
    )
    told = answer.raise_for_status().json()["choices"][0]["expert_choices"]
    counts = Counter(
        (layer, expert)
        for token in told["prompt"]["experts"]
        for layer, experts in enumerate(token)
        for expert in experts
    )
    return counts.most_common(1)[0]


@contextmanager
def heating(url: str, token_id: int, *, num_clients: int = 2) -> Iterator[None]:
    """Requests one after the other until the block ends. They take nothing from a prefix cache."""
    body = _body(token_id) | {"return_expert_choices": True}
    with _asking(url, lambda _: body, num_clients):
        yield


@contextmanager
def everyday_load(url: str, texts: Sequence[str], *, num_clients: int = 3) -> Iterator[None]:
    """Completions of `texts` in turn until the block ends."""

    def body(number: int) -> dict[str, object]:
        return {"prompt": texts[number % len(texts)], "max_tokens": 24}

    with _asking(url, body, num_clients):
        yield


@contextmanager
def _asking(url: str, body: Callable[[int], dict[str, object]], num_clients: int) -> Iterator[None]:
    is_over = threading.Event()

    def ask(first: int) -> None:
        with httpx.Client(timeout=120) as client:
            for number in itertools.count(first, num_clients):
                if is_over.is_set():
                    return
                client.post(f"{url}/v1/completions", json=body(number))

    clients = [
        threading.Thread(target=ask, args=(first,), daemon=True) for first in range(num_clients)
    ]
    for client in clients:
        client.start()
    try:
        yield
    finally:
        is_over.set()
        for client in clients:
            client.join(timeout=120)


def _body(token_id: int) -> dict[str, object]:
    return {"prompt": [token_id] * NUM_TOKENS, "max_tokens": 1, "temperature": 0}
