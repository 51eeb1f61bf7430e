"""The live connection: lost, found, refused, and nothing asked of anybody else."""

from __future__ import annotations

import re

from playwright.sync_api import expect

from tests.browser.conftest import OpenPage
from tests.browser.fixture_gateway import FixtureGateway
from tests.browser.views import completion, fleet_view
from tests.support.waiting import wait_until


def test_a_lost_connection_is_visible_and_heals_by_itself(
    gateway: FixtureGateway, open_page: OpenPage
) -> None:
    gateway.show(fleet_view())
    page = open_page()
    expect(page.locator("#connection-text")).to_have_text("Live")
    gateway.drop()
    expect(page.locator("#connection-text")).to_have_text("Connection lost")
    expect(page.get_by_role("button", name="Retry now")).to_be_visible()
    expect(page.locator("td.cell")).to_have_count(32)  # what was known last stays

    gateway.is_down = False
    gateway.view = fleet_view(hot={(0, 0): 900.0})
    expect(page.locator("#connection-text")).to_have_text("Live")
    expect(page.locator("td.cell.hot")).to_have_count(1)
    expect(page.get_by_role("button", name="Retry now")).to_be_hidden()


def test_waits_between_attempts_grow_and_a_person_can_cut_them_short(
    gateway: FixtureGateway, open_page: OpenPage
) -> None:
    gateway.show(fleet_view())
    gateway.is_down = True
    page = open_page()
    page.clock.install(time=0)
    page.clock.pause_at(1)
    page.reload()
    waiting = page.locator("#connection[data-left*='again in']")
    expect(waiting).to_be_visible()
    for _ in range(6):  # 0.5, 1, 2, 4, 8, 10 s, each within a fifth
        before = gateway.num_refused
        page.clock.run_for(12_500)
        assert_refused_after(gateway, before)
        expect(waiting).to_be_visible()
    before = gateway.num_refused
    expect(page.locator("#connection")).to_have_attribute(
        "data-left", re.compile(r"again in ([89]|1[012]) s")
    )
    page.clock.run_for(7_000)  # less than the longest wait
    assert gateway.num_refused == before
    gateway.is_down = False
    page.get_by_role("button", name="Retry now").click()
    expect(page.locator("#connection-text")).to_have_text("Live")


def assert_refused_after(gateway: FixtureGateway, before: int) -> None:
    wait_until(lambda: gateway.num_refused > before, timeout_s=30, what="another attempt")


def test_a_silent_connection_is_opened_again(gateway: FixtureGateway, open_page: OpenPage) -> None:
    gateway.show(fleet_view())
    page = open_page()
    page.clock.install(time=0)
    page.clock.pause_at(1)
    page.reload()
    expect(page.locator("#connection-text")).to_have_text("Live")
    before = gateway.num_streams
    page.clock.run_for(25_100)  # keep-alives come every 10 s
    expect(page.locator("#connection-text")).to_have_text("Connection lost")
    page.clock.run_for(1_000)
    expect(page.locator("#connection-text")).to_have_text("Live")
    assert gateway.num_streams == before + 1


def test_the_key_is_asked_for_and_kept_for_the_tab(
    gateway: FixtureGateway, open_page: OpenPage
) -> None:
    gateway.api_key = "right"
    gateway.show(fleet_view())
    page = open_page()
    dialog = page.get_by_role("dialog", name="API key")
    expect(dialog).to_be_visible()
    dialog.get_by_label("Key", exact=True).fill("wrong")
    dialog.get_by_role("button", name="Use this key").click()
    expect(dialog).to_contain_text("not one this gateway knows")
    dialog.get_by_label("Key", exact=True).fill("right")
    page.keyboard.press("Enter")
    expect(page.locator("#connection-text")).to_have_text("Live")
    page.reload()
    expect(page.locator("#connection-text")).to_have_text("Live")
    expect(dialog).to_be_hidden()
    assert page.evaluate("localStorage.length") == 0


def test_without_a_key_the_page_waits_and_asks_again(
    gateway: FixtureGateway, open_page: OpenPage
) -> None:
    gateway.api_key = "right"
    gateway.show(fleet_view())
    page = open_page()
    expect(page.get_by_role("dialog", name="API key")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#connection-text")).to_have_text("API key needed")
    page.get_by_role("button", name="Enter key").click()
    expect(page.get_by_role("dialog", name="API key")).to_be_visible()


def test_nothing_is_asked_of_anybody_but_the_gateway(
    gateway: FixtureGateway, open_page: OpenPage
) -> None:
    gateway.show(fleet_view())
    gateway.answers["/v1/completions"] = (200, completion())
    gateway.answers["/v1/traces"] = (200, {"traces": []})
    page = open_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.reload()
    expect(page.locator("#connection-text")).to_have_text("Live")
    page.get_by_role("link", name="Routing").click()
    page.get_by_role("button", name="Run").click()
    expect(page.locator(".token").first).to_be_visible()
    page.get_by_role("link", name="Traces").click()
    expect(page.locator("#trace-list")).to_contain_text("No trace yet")
    assert len(asked) > 20
    assert [url for url in asked if not url.startswith(gateway.url + "/")] == []


def test_the_page_runs_under_a_policy_without_inline_code(
    gateway: FixtureGateway, open_page: OpenPage
) -> None:
    """`open_page` fails where the policy was broken; here it is that there is one."""
    page = open_page()
    answer = page.request.get(gateway.url)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for inline in (" style=", "<style", " onclick=", "<script>"):
        assert inline not in answer.text()
