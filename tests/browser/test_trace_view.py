"""One request as a waterfall, and a sampled step opened."""

from __future__ import annotations

from playwright.sync_api import expect

from tests.browser.conftest import OpenPage
from tests.browser.fixture_gateway import FixtureGateway
from tests.browser.views import fleet_view, trace

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"


def test_a_request_is_shown_as_a_waterfall_of_its_phases(
    gateway: FixtureGateway, open_page: OpenPage
) -> None:
    gateway.answers[f"/v1/traces/{TRACE_ID}"] = (200, trace())
    page = open_page(f"#trace={TRACE_ID}")
    rows = page.locator(".waterfall tbody tr")
    expect(rows.locator("th")).to_have_text(
        ["Request", "Generation in the shard", "Queue", "Prefill", "Decode"]
    )
    expect(rows.nth(3)).to_contain_text("200 ms")
    lane = rows.nth(3).locator(".lane").bounding_box()
    bar = rows.nth(3).locator(".bar").bounding_box()
    assert lane is not None
    assert bar is not None
    # From 100 ms, for 200 ms, of 1000 ms.
    assert abs((bar["x"] - lane["x"]) / lane["width"] - 0.1) < 0.01
    assert abs(bar["width"] / lane["width"] - 0.2) < 0.01


def test_a_sampled_step_opens_by_layer_and_worker(
    gateway: FixtureGateway, open_page: OpenPage
) -> None:
    gateway.answers[f"/v1/traces/{TRACE_ID}"] = (200, trace())
    page = open_page(f"#trace={TRACE_ID}")
    step = page.locator(".step")
    # Per layer the slower of two dispatches: 8 ms, 1 of it queue, 4 compute, so 3 on the wire.
    expect(step.locator(".parts")).to_have_text(
        "shard 14.0 ms (47 %) · wire 6.0 ms (20 %) · queue 2.0 ms (7 %) · compute 8.0 ms (27 %)"
    )
    step.locator("summary").focus()
    page.keyboard.press("Enter")
    rows = step.locator("tbody tr")
    expect(rows).to_have_count(4)
    expect(rows.nth(0)).to_contain_text("expert-0")
    expect(rows.nth(0).locator("td.number")).to_have_text(["8.0 ms", "1.0 ms", "3.0 ms", "4.0 ms"])
    expect(rows.nth(3)).to_contain_text("expert-1")


def test_a_trace_that_is_not_there_says_why_and_can_be_looked_for_again(
    gateway: FixtureGateway, open_page: OpenPage
) -> None:
    message = "Spans go to a collector: look for the trace there"
    gateway.answers["/v1/traces/abc"] = (404, {"error": {"message": message}})
    page = open_page("#trace=abc")
    expect(page.get_by_role("alert")).to_contain_text(message)
    gateway.answers["/v1/traces/abc"] = (200, trace())
    page.get_by_role("button", name="Look again").click()
    expect(page.locator("#trace-title")).to_have_text("Request req-1")


def test_a_trace_that_is_still_on_its_way_is_waited_for(
    gateway: FixtureGateway, open_page: OpenPage
) -> None:
    page = open_page()
    with page.expect_response(lambda response: response.status == 404):
        page.evaluate("location.hash = 'trace=abc'")
    gateway.answers["/v1/traces/abc"] = (200, trace())
    expect(page.locator("#trace-title")).to_have_text("Request req-1")


def test_traces_of_late_are_listed_and_an_id_can_be_entered(
    gateway: FixtureGateway, open_page: OpenPage
) -> None:
    gateway.show(fleet_view())
    gateway.answers["/v1/traces"] = (
        200,
        {
            "traces": [
                {
                    "trace_id": TRACE_ID,
                    "request_id": "req-1",
                    "response_id": "cmpl-1",
                    "started_at": 1_700_000_000.0,
                    "duration_ms": 1000.0,
                    "status": 200,
                }
            ]
        },
    )
    gateway.answers[f"/v1/traces/{TRACE_ID}"] = (200, trace())
    gateway.answers["/v1/traces/req-1"] = (200, trace())
    page = open_page("#traces")
    page.get_by_role("link", name="cmpl-1").click()
    expect(page.locator("#trace-title")).to_be_visible()
    page.get_by_role("link", name="Traces").click()
    page.get_by_label("Trace id or request id").fill("req-1")
    page.keyboard.press("Enter")
    expect(page.locator("#trace-title")).to_be_visible()
    assert page.url.endswith("#trace=req-1")
