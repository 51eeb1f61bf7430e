"""The page of a started product: what it shows is what the fleet does."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.conftest import PATIENCE_MS as FIXTURE_PATIENCE_MS
from tests.browser.heat import heating, hot_cell
from tests.support.product import Product

pytestmark = pytest.mark.timeout(400)
PATIENCE_MS = 120_000
TOKENS = (300, 500, 700, 900, 1100)


@pytest.fixture(scope="module")
def product(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Product]:
    """Four workers, gateway and engine in one process; every second step is traced into files."""
    started = Product(
        tmp_path_factory.mktemp("console") / "state",
        "--workers",
        "4",
        "--no-ray",
        environment={"EXPERTFLEET_STEP_SAMPLE_INTERVAL": "2"},
    ).start()
    try:
        yield started
    finally:
        started.stop()


@pytest.fixture
def page(browser: Browser, product: Product) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    context.set_default_timeout(PATIENCE_MS)
    expect.set_options(timeout=PATIENCE_MS)
    made = context.new_page()
    problems: list[str] = []
    made.on("pageerror", lambda error: problems.append(str(error)))
    made.goto(product.url)
    expect(made.locator("#connection-text")).to_have_text("Live")
    yield made
    expect.set_options(timeout=FIXTURE_PATIENCE_MS)
    context.close()
    assert problems == []


def test_the_map_fills_under_load_and_a_hot_expert_is_seen_at_once(
    product: Product, page: Page
) -> None:
    """From the first request to a marked cell: 2 s, and as much more as this machine has more work
    than cores. The best of some rounds counts, each with another token."""
    delays_s: list[float] = []
    for token_id in TOKENS:
        cell = hot_cell(page, product, token_id)
        with heating(product.url, token_id):
            began = time.monotonic()
            expect(cell).to_have_class(re.compile(r"\bhot\b"))
            delays_s.append(time.monotonic() - began)
            expect(page.locator("#hottest li.hot").first).to_be_visible()
        if delays_s[-1] <= _bound_s():
            break
    print("seconds until a hot expert was seen:", [round(delay, 2) for delay in delays_s])
    assert min(delays_s) <= _bound_s()
    _complete(product, "Every expert of a layer gets some of a text as long as this one. " * 4)
    page.get_by_role("radio", name="Window").check(force=True)
    expect(page.locator("td.cell:not(.h0)").nth(19)).to_be_visible()  # of 32


def test_a_killed_worker_turns_red_and_back(product: Product, page: Page) -> None:
    row = page.locator('#workers [data-key="expert-1"]')
    expect(row.locator(".state")).to_contain_text("ready")
    os.kill(_worker_pid(product, "expert-1"), signal.SIGKILL)
    expect(row).to_have_class(re.compile(r"\b(lost|returned)\b"))
    expect(row).to_contain_text("lost")
    expect(row.locator(".state")).to_contain_text("ready")
    expect(row).to_have_class("worker ready")
    expect(page.locator("td.cell.absent")).to_have_count(0)


def test_tokens_have_the_colours_of_the_experts_that_the_engine_chose(
    product: Product, page: Page
) -> None:
    page.get_by_role("link", name="Routing").click()
    page.get_by_label("Prompt", exact=True).fill("class Stack:\n    def push(self, item):")
    page.get_by_label("Max tokens").fill("12")
    with page.expect_response("**/v1/completions") as answered:
        page.get_by_role("button", name="Run").click()
    asked = answered.value.request.post_data_json
    expect(page.locator(".token").first).to_be_visible()

    # The same request again, without the page: greedy, so it has the same answer.
    told = httpx.post(f"{product.url}/v1/completions", json=asked, timeout=120).json()
    choices = told["choices"][0]["expert_choices"]
    tokens = choices["prompt"]["tokens"] + choices["completion"]["tokens"]
    experts = choices["prompt"]["experts"] + choices["completion"]["experts"]
    assert len(tokens) > 15
    for layer in range(choices["num_layers"]):
        page.get_by_role("slider", name=re.compile("Layer")).fill(str(layer))
        shown = page.locator(".token").evaluate_all(
            "all => all.map(e => [e.className, e.lastChild.textContent])"
        )
        assert len(shown) == len(tokens)
        for (name, number), chosen in zip(shown, experts, strict=True):
            if chosen is None:
                assert "unrouted" in name
                continue
            first, second = chosen[layer]
            assert number == str(first)
            assert {f"e{first}", f"also-e{second}"} <= set(name.split())
    expect(page.locator(".random-label")).to_have_text("random 12.5 %")


def test_the_trace_of_a_request_opens_down_to_a_worker(product: Product, page: Page) -> None:
    page.get_by_role("link", name="Routing").click()
    page.get_by_label("Max tokens").fill("16")
    page.get_by_role("button", name="Run").click()
    page.get_by_role("link", name="Its trace").click()
    phases = page.locator(".waterfall tbody th")
    expect(phases.filter(has_text="Prefill")).to_be_visible()
    expect(phases.filter(has_text="Decode")).to_be_visible()
    page.locator(".step summary").first.click()
    rows = page.locator(".step[open] tbody tr")
    expect(rows.first).to_contain_text("expert-")
    assert rows.count() >= 4  # a worker or more in each of the layers


def test_a_slow_request_is_listed_with_the_way_to_its_trace(product: Product, page: Page) -> None:
    _complete(product, "import")
    page.locator("#slow a.name").first.click()
    expect(page.locator("#trace-title")).to_be_visible()


def _complete(product: Product, prompt: str) -> None:
    body = {"prompt": prompt, "max_tokens": 16}
    httpx.post(f"{product.url}/v1/completions", json=body, timeout=120).raise_for_status()


def _worker_pid(product: Product, worker_id: str) -> int:
    [pid] = [w["pid"] for w in product.experts()["workers"] if w["worker_id"] == worker_id]
    return int(pid)


def _bound_s() -> float:
    """2 s on a machine that is not busier than it has cores."""
    return 2.0 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
