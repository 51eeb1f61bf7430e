"""The map of layers x experts."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import OpenPage
from tests.browser.fixture_gateway import FixtureGateway
from tests.browser.views import fleet_view


def _cell(page: Page, layer: int, expert: int) -> str:
    return f'td.cell[data-layer="{layer}"][data-expert="{expert}"]'


def _step(page: Page, layer: int, expert: int) -> int:
    """0..9: how hot the cell is painted."""
    name = page.locator(_cell(page, layer, expert)).get_attribute("class") or ""
    found = re.search(r"\bh(\d)\b", name)
    assert found is not None
    return int(found.group(1))


def test_every_expert_of_every_layer_has_a_cell_with_its_rate(
    gateway: FixtureGateway, open_page: OpenPage
) -> None:
    gateway.show(fleet_view(hot={(1, 3): 1234.0, (2, 2): 0.0}))
    page = open_page()
    expect(page.locator("td.cell")).to_have_count(4 * 8)
    expect(page.locator(f"{_cell(page, 1, 3)} .value")).to_have_text("1.2k")
    expect(page.locator(f"{_cell(page, 0, 0)} .value")).to_have_text("100")
    expect(page.locator(f"{_cell(page, 2, 2)} .value")).to_have_text("0")
    assert (_step(page, 1, 3), _step(page, 2, 2)) == (9, 0)
    assert 0 < _step(page, 0, 0) < 9


def test_a_hot_expert_is_marked_and_named_first_and_its_layer_is_the_most_uneven(
    gateway: FixtureGateway, open_page: OpenPage
) -> None:
    gateway.show(fleet_view(hot={(2, 5): 900.0}))
    page = open_page()
    expect(page.locator("td.cell.hot")).to_have_count(1)
    expect(page.locator(_cell(page, 2, 5))).to_have_class(re.compile(r"\bhot\b"))
    expect(page.locator("#hottest li").first).to_contain_text("Layer 2, expert 5")
    expect(page.locator("#map-note")).to_contain_text("layer 2")
    expect(page.locator("#cell-title")).to_have_text("Layer 2, expert 5")


def test_a_new_view_repaints_what_changed(gateway: FixtureGateway, open_page: OpenPage) -> None:
    gateway.show(fleet_view(hot={(0, 1): 900.0}))
    page = open_page()
    expect(page.locator(_cell(page, 0, 1))).to_have_class(re.compile(r"\bhot\b"))
    gateway.show(fleet_view(hot={(3, 7): 900.0}))
    expect(page.locator(_cell(page, 3, 7))).to_have_class(re.compile(r"\bhot\b"))
    expect(page.locator("td.cell.hot")).to_have_count(1)


def test_the_switch_shows_the_long_window(gateway: FixtureGateway, open_page: OpenPage) -> None:
    gateway.show(fleet_view(hot={(1, 1): 800.0}))
    page = open_page()
    expect(page.locator(f"{_cell(page, 1, 1)} .value")).to_have_text("800")
    page.get_by_role("radio", name="Window, 60 s").check(force=True)
    expect(page.locator(f"{_cell(page, 1, 1)} .value")).to_have_text("400")


def test_the_keyboard_walks_the_map_and_pins_an_expert(
    gateway: FixtureGateway, open_page: OpenPage
) -> None:
    gateway.show(fleet_view())
    page = open_page()
    page.locator(_cell(page, 0, 0)).focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
    expect(page.locator(_cell(page, 2, 3))).to_be_focused()
    expect(page.locator("#cell-title")).to_have_text("Layer 2, expert 3")
    page.keyboard.press("Enter")
    expect(page.locator("#cell-title")).to_have_text("Layer 2, expert 3 (pinned)")
    expect(page.locator(_cell(page, 2, 3))).to_have_attribute("aria-selected", "true")
    page.keyboard.press("Control+End")
    expect(page.locator(_cell(page, 3, 7))).to_be_focused()
    # The detail stays with what is pinned, and a new view keeps the focus.
    expect(page.locator("#cell-title")).to_have_text("Layer 2, expert 3 (pinned)")
    gateway.show(fleet_view(rate=50.0))
    expect(page.locator("#cell [data-figure=now]")).not_to_have_text("–")
    expect(page.locator(_cell(page, 3, 7))).to_be_focused()
    page.keyboard.press("ArrowDown")
    expect(page.locator(_cell(page, 3, 7))).to_be_focused()


def test_only_one_cell_is_a_tab_stop(gateway: FixtureGateway, open_page: OpenPage) -> None:
    gateway.show(fleet_view(num_layers=12))
    page = open_page()
    expect(page.locator("td.cell")).to_have_count(12 * 8)
    expect(page.locator('td.cell[tabindex="0"]')).to_have_count(1)
    page.locator(_cell(page, 5, 5)).click()
    expect(page.locator('td.cell[tabindex="0"]')).to_have_count(1)
    expect(page.locator(_cell(page, 5, 5))).to_have_attribute("tabindex", "0")


def test_the_detail_names_the_workers_that_hold_the_expert(
    gateway: FixtureGateway, open_page: OpenPage
) -> None:
    gateway.show(fleet_view(num_workers=4))
    page = open_page()
    page.locator(_cell(page, 1, 6)).click()
    expect(page.locator("#cell .holders li")).to_have_count(1)
    expect(page.locator("#cell .holders")).to_contain_text("expert-2")


@pytest.mark.parametrize(
    ("num_layers", "num_experts", "width"),
    [(56, 8, 1440), (32, 8, 1440), (32, 128, 1440), (56, 8, 360), (4, 128, 360)],
)
def test_maps_of_large_models_fit_and_show_their_hot_expert(
    gateway: FixtureGateway, open_page: OpenPage, num_layers: int, num_experts: int, width: int
) -> None:
    hot = (num_layers - 2, num_experts - 1)
    gateway.show(fleet_view(num_layers=num_layers, num_experts=num_experts, hot={hot: 5000.0}))
    page = open_page(width=width)
    expect(page.locator("td.cell")).to_have_count(num_layers * num_experts)
    expect(page.locator(_cell(page, *hot))).to_have_class(re.compile(r"\bhot\b"))
    box = page.locator(_cell(page, *hot)).bounding_box()
    assert box is not None
    assert box["width"] >= 4
    assert box["height"] >= 16
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    if width >= 1000:  # a large screen shows the whole map without scrolling within it
        assert page.evaluate("(s => s.scrollWidth <= s.clientWidth)(document.all['map-scroll'])")


def test_a_deep_model_lies_on_its_side_on_a_large_screen_and_its_keys_with_it(
    gateway: FixtureGateway, open_page: OpenPage
) -> None:
    gateway.show(fleet_view(num_layers=56))
    page = open_page(width=1440)
    expect(page.locator("#map tbody tr")).to_have_count(8 + 1)
    page.locator(_cell(page, 0, 0)).focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator(_cell(page, 1, 0))).to_be_focused()
    page.keyboard.press("ArrowDown")
    expect(page.locator(_cell(page, 1, 1))).to_be_focused()


def test_without_a_reading_or_experts_the_map_says_what_is_missing(
    gateway: FixtureGateway, open_page: OpenPage
) -> None:
    early = fleet_view()
    early["load"]["now_s"] = early["load"]["window_s"] = None
    early["load"]["hottest"] = []
    for layer in early["load"]["layers"]:
        layer["now"] = layer["window"] = layer["imbalance"] = layer["imbalance_now"] = None
    gateway.show(early)
    page = open_page()
    expect(page.locator("#map-note")).to_contain_text("Waiting for the first two readings")
    expect(page.locator("#hottest")).to_contain_text("No expert is at work")

    dense = fleet_view(num_layers=0)
    dense["workers"] = []
    gateway.show(dense)
    expect(page.locator("#map-empty")).to_contain_text("no experts")
    expect(page.locator("#workers")).to_contain_text("No worker")
