"""Workers, shards, requests: what is told of them, and that a loss is seen."""

from __future__ import annotations

import re

from playwright.sync_api import Page, expect

from tests.browser.conftest import OpenPage
from tests.browser.fixture_gateway import FixtureGateway
from tests.browser.views import fleet_view, slow_request

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"


def _is_reddish(page: Page, selector: str) -> bool:
    """Whether the element's background is clearly more red than green and blue."""
    color = page.locator(selector).first.evaluate("e => getComputedStyle(e).backgroundColor")
    red, green, blue = (int(value) for value in re.findall(r"\d+", color)[:3])
    return red - max(green, blue) >= 8


def test_a_lost_worker_turns_red_with_a_word_and_comes_back(
    gateway: FixtureGateway, open_page: OpenPage
) -> None:
    gateway.show(fleet_view())
    page = open_page()
    row = page.locator('#workers [data-key="expert-2"]')
    expect(row.locator(".state")).to_contain_text("ready")
    assert not _is_reddish(page, '#workers [data-key="expert-2"]')

    gateway.show(fleet_view(states={"expert-2": "lost"}))
    expect(row.locator(".state")).to_contain_text("✕")
    expect(row.locator(".state")).to_contain_text("lost")
    expect(row).to_contain_text(re.compile(r"lost\d+(\.0)? s ago"))
    expect(page.locator("#workers tbody tr").first).to_have_attribute("data-key", "expert-2")
    expect(page.locator("#announcer")).to_have_text("Worker expert-2 is lost.")
    expect(page.locator("#summary")).to_contain_text("1 lost")
    assert _is_reddish(page, '#workers [data-key="expert-2"]')
    # Its experts have nobody: the map says so too.
    expect(page.locator("td.cell.absent")).to_have_count(4 * 2)

    gateway.show(fleet_view())
    expect(row.locator(".state")).to_contain_text("ready")
    expect(page.locator("#announcer")).to_have_text("Worker expert-2 is back.")
    expect(page.locator("td.cell.absent")).to_have_count(0)
    assert not _is_reddish(page, '#workers [data-key="expert-2"]')


def test_a_worker_that_was_restarted_at_once_is_red_for_a_moment(
    gateway: FixtureGateway, open_page: OpenPage
) -> None:
    view = fleet_view()
    view["workers"][1]["lost_at"] = view["at"] - 1.0
    gateway.show(view)
    page = open_page()
    row = page.locator('#workers [data-key="expert-1"]')
    expect(row).to_contain_text("was lost")
    expect(row).not_to_have_class(re.compile("returned"))  # after some seconds, without news
    assert not _is_reddish(page, '#workers [data-key="expert-1"]')


def test_a_worker_shows_where_it_runs_what_it_holds_and_how_busy_it_is(
    gateway: FixtureGateway, open_page: OpenPage
) -> None:
    gateway.show(fleet_view())
    page = open_page()
    cells = page.locator('#workers [data-key="expert-1"] td')
    for index, text in enumerate(
        [
            "ready",
            "cpu on node-1",
            "1, 5 in layers 0–3",
            "300 MiB of 1.0 GiB",
            "0.40 ms",
            "1.6 ms",
            "35 %",
            "800",
            "12,345",
        ]
    ):
        expect(cells.nth(index)).to_contain_text(text)


def test_a_shard_shows_its_batch_cache_and_latencies(
    gateway: FixtureGateway, open_page: OpenPage
) -> None:
    gateway.show(fleet_view())
    page = open_page()
    row = page.locator('#shards [data-key="shard-0"]')
    for text in ("12 of 64", "30 % of 1k", "41.0 ms", "p95 120 ms", "8.2 ms", "480"):
        expect(row).to_contain_text(text)


def test_slow_requests_link_to_their_traces(gateway: FixtureGateway, open_page: OpenPage) -> None:
    gateway.show(
        fleet_view(
            slow_requests=[
                slow_request("req-a", trace_id=TRACE_ID, duration_s=4.0),
                slow_request("req-b", trace_id=None, duration_s=1.5),
            ]
        )
    )
    page = open_page()
    link = page.get_by_role("link", name="req-a")
    expect(link).to_have_attribute("href", f"#trace={TRACE_ID}")
    expect(page.get_by_role("link", name="req-b")).to_have_count(0)
    expect(page.locator('#slow [data-key="req-b"]')).to_contain_text("1.5 s")


def test_the_operators_own_trace_store_is_linked_but_no_script(
    gateway: FixtureGateway, open_page: OpenPage
) -> None:
    slow = [slow_request("req-a", trace_id=TRACE_ID, duration_s=4.0)]
    gateway.show(fleet_view(slow_requests=slow, trace_url="https://traces.example/t/{trace_id}"))
    page = open_page()
    link = page.get_by_role("link", name="req-a")
    expect(link).to_have_attribute("href", f"https://traces.example/t/{TRACE_ID}")
    expect(link).to_have_attribute("rel", "noopener noreferrer")

    gateway.show(fleet_view(slow_requests=slow, trace_url="javascript:alert(1)//{trace_id}"))
    page.reload()
    link = page.get_by_role("link", name="req-a")
    expect(link).to_have_attribute("href", f"#trace={TRACE_ID}")


def test_what_a_worker_calls_itself_is_shown_as_text(
    gateway: FixtureGateway, open_page: OpenPage
) -> None:
    view = fleet_view()
    name = "<img src=x onerror=\"document.title='broken'\">"
    view["workers"][0]["worker_id"] = view["workers"][0]["host"] = name
    gateway.show(view)
    page = open_page()
    expect(page.locator("#workers")).to_contain_text("<img src=x")
    expect(page.locator("#workers img")).to_have_count(0)
    expect(page).to_have_title("demo · expertfleet")


def test_the_summary_tells_the_models_rate_and_the_sessions(
    gateway: FixtureGateway, open_page: OpenPage
) -> None:
    view = fleet_view()
    for layer in view["load"]["layers"]:
        layer["now"] = [50.0] * 8
    gateway.show(view)
    page = open_page()
    # 8 experts x 50 tokens/s in each layer, two experts a token.
    expect(page.locator("[data-figure=rate]")).to_have_text("200")
    expect(page.locator("[data-figure=sessions]")).to_have_text("17")
    expect(page.locator("#summary")).to_contain_text("1 waiting")


def test_a_store_that_is_away_is_said(gateway: FixtureGateway, open_page: OpenPage) -> None:
    gateway.show(fleet_view(store="away"))
    page = open_page()
    expect(page.locator("#connection")).to_contain_text("the store is away")
    gateway.show(fleet_view())
    expect(page.locator("#connection-text")).to_have_text("Live")
