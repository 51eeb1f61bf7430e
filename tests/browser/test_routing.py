"""The text box: tokens coloured by expert, and how often neighbours repeat."""

from __future__ import annotations

import re

from playwright.sync_api import Page, expect

from tests.browser.conftest import OpenPage
from tests.browser.fixture_gateway import FixtureGateway
from tests.browser.views import chosen_experts, completion, fleet_view


def _run(gateway: FixtureGateway, open_page: OpenPage, **answer: int | str) -> Page:
    gateway.show(fleet_view())
    gateway.answers["/v1/completions"] = (200, completion(**answer))  # type: ignore[arg-type]
    page = open_page("#routing")
    expect(page.locator("#connection-text")).to_have_text("Live")
    page.get_by_role("button", name="Run").click()
    expect(page.locator(".token").first).to_be_visible()
    return page


def _set_layer(page: Page, layer: int) -> None:
    page.get_by_role("slider", name=re.compile("Layer")).fill(str(layer))


def test_what_is_asked_is_the_prompt_with_expert_choices(
    gateway: FixtureGateway, open_page: OpenPage
) -> None:
    gateway.show(fleet_view())
    gateway.answers["/v1/completions"] = (200, completion())
    page = open_page("#routing")
    expect(page.locator("#connection-text")).to_have_text("Live")
    page.get_by_label("Prompt", exact=True).fill("import os")
    page.get_by_label("Max tokens").fill("7")
    page.get_by_role("button", name="Run").click()
    expect(page.locator("#run-status")).to_contain_text("5 tokens in, 12 out")
    [(path, body)] = gateway.received
    assert path == "/v1/completions"
    assert body == {
        "model": "demo",
        "prompt": "import os",
        "max_tokens": 7,
        "temperature": 0,
        "return_expert_choices": True,
    }


def test_every_token_is_painted_by_its_expert_at_the_chosen_layer(
    gateway: FixtureGateway, open_page: OpenPage
) -> None:
    page = _run(gateway, open_page)
    tokens = page.locator(".token")
    expect(tokens).to_have_count(5 + 12)
    for layer in (0, 3):
        _set_layer(page, layer)
        for index in range(16):
            first, second = chosen_experts(index, layer)
            token = tokens.nth(index)
            expect(token).to_have_class(re.compile(rf"\be{first}\b.*\balso-e{second}\b"))
            expect(token.locator(".number")).to_have_text(str(first))
            expect(token).to_have_attribute(
                "title", re.compile(rf"layer {layer}: expert {first}, then {second}$")
            )
    # The last token of the completion was never run through the model.
    expect(tokens.nth(16)).to_have_class(re.compile("unrouted"))

    page.get_by_role("radio", name="Second choice").check(force=True)
    expect(tokens.nth(4).locator(".number")).to_have_text(str(chosen_experts(4, 3)[1]))


def test_the_keyboard_walks_the_tokens_and_shows_their_way_through_the_layers(
    gateway: FixtureGateway, open_page: OpenPage
) -> None:
    page = _run(gateway, open_page)
    tokens = page.get_by_role("option")
    tokens.first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(2)).to_be_focused()
    expect(tokens.nth(2)).to_have_attribute("aria-selected", "true")
    steps = page.locator("#token-path li")
    expect(steps).to_have_count(4)
    for layer in range(4):
        first, second = chosen_experts(2, layer)
        expect(steps.nth(layer)).to_have_attribute(
            "aria-label", f"Layer {layer}: experts {first}, {second}"
        )


def test_one_expert_can_be_looked_at_alone(gateway: FixtureGateway, open_page: OpenPage) -> None:
    page = _run(gateway, open_page)
    expert = chosen_experts(0, 0)[0]
    chosen = sum(chosen_experts(index, 0)[0] == expert for index in range(16))
    page.get_by_role("button", name=re.compile(f"Expert {expert}:")).click()
    expect(page.locator(".token.dim")).to_have_count(16 - chosen)
    page.get_by_role("button", name=re.compile(f"Expert {expert}:")).click()
    expect(page.locator(".token.dim")).to_have_count(0)


def test_repeats_are_drawn_against_chance_and_told_as_a_table(
    gateway: FixtureGateway, open_page: OpenPage
) -> None:
    page = _run(gateway, open_page)
    expect(page.locator(".chart .column")).to_have_count(4)
    expect(page.locator(".random-label")).to_have_text("random 12.5 %")
    heights = page.locator(".chart .column").evaluate_all(
        "bars => bars.map(bar => bar.height.baseVal.value)"
    )
    assert heights == sorted(heights)
    assert heights[3] / heights[0] == (0.17 / 0.14) or abs(heights[3] / heights[0] - 17 / 14) < 0.01
    page.get_by_text("As a table").click()
    expect(page.locator("#repeats tbody tr")).to_have_count(5)
    expect(page.locator("#repeats tbody tr").nth(2)).to_contain_text("16 %")
    page.get_by_role("radio", name="Any in common").check(force=True)
    expect(page.locator(".random-label")).to_have_text("random 46.4 %")


def test_a_click_on_the_chart_chooses_the_layer(
    gateway: FixtureGateway, open_page: OpenPage
) -> None:
    page = _run(gateway, open_page)
    page.locator('.chart [data-layer="2"] .hit').click()
    expect(page.locator("#layer-value")).to_have_text("2")
    first = chosen_experts(0, 2)[0]
    expect(page.locator(".token").first.locator(".number")).to_have_text(str(first))


def test_a_token_that_looks_like_a_page_stays_text(
    gateway: FixtureGateway, open_page: OpenPage
) -> None:
    page = _run(gateway, open_page, hostile="<script>document.title='broken'</script>")
    expect(page.locator(".token").first).to_contain_text("<script>")
    expect(page.locator("#tokens script")).to_have_count(0)
    expect(page).to_have_title("demo · expertfleet")


def test_a_model_of_many_experts_repeats_colours_but_not_numbers(
    gateway: FixtureGateway, open_page: OpenPage
) -> None:
    page = _run(gateway, open_page, num_experts=64, num_tokens=20)
    first = chosen_experts(15, 0, 64)[0]
    assert first >= 8
    token = page.locator(".token").nth(15)
    expect(token).to_have_class(re.compile(rf"\be{first % 8}\b"))
    expect(token.locator(".number")).to_have_text(str(first))


def test_a_refusal_is_told_in_the_gateways_words(
    gateway: FixtureGateway, open_page: OpenPage
) -> None:
    gateway.show(fleet_view())
    message = "prompt: 9000 tokens, but the model takes 4096"
    gateway.answers["/v1/completions"] = (400, {"error": {"message": message}})
    page = open_page("#routing")
    page.get_by_role("button", name="Run").click()
    expect(page.locator("#run-status")).to_contain_text(message)
    expect(page.locator("#routing-result")).to_be_hidden()
    expect(page.get_by_role("button", name="Run")).to_be_enabled()
