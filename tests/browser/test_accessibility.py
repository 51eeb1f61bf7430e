"""Landmarks, names, contrast, themes, small screens: the page for everyone."""

from __future__ import annotations

from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import OpenPage
from tests.browser.fixture_gateway import FixtureGateway
from tests.browser.views import completion, fleet_view, slow_request, trace

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
VIEWS = ("load", "routing", "trace")

# Every visible text with the contrast against what is painted behind it (WCAG 2.2, 1.4.3).
# Colours are read back from a canvas, so that any notation is understood.
CONTRASTS = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = ([r, g, b]) => [r, g, b].map((value) => {
    const share = value / 255;
    return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
  }).reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const color = rgba(getComputedStyle(at).backgroundColor);
      if (color[3] === 255) return color;
    }
    return [255, 255, 255, 255];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.data.trim();
    const element = walker.currentNode.parentElement;
    if (!text || !element.checkVisibility({ visibilityProperty: true })) continue;
    if (element.closest(".unseen, dialog:not([open]), :disabled, .skip, option")) continue;
    const style = getComputedStyle(element);
    if (parseFloat(style.fontSize) < 1) continue;
    const isSvg = element instanceof SVGElement;
    const front = luminance(rgba(isSvg ? style.fill : style.color));
    const back = luminance(behind(element));
    const ratio = (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
    found.push({ text, ratio, where: element.className.baseVal ?? element.className });
  }
  return found;
}"""

# What can be operated, with the name a screen reader says.
NAMES = """() => [...document.querySelectorAll(
    "button, input, textarea, a, summary, table, section, [role]")]
  .filter((element) => element.checkVisibility())
  .map((element) => ({
    tag: element.tagName.toLowerCase(),
    role: element.getAttribute("role"),
    html: element.outerHTML.slice(0, 120),
    name: element.getAttribute("aria-label")
      || [...(element.labels ?? [])].map((label) => label.textContent).join(" ").trim()
      || (element.getAttribute("aria-labelledby") ?? "").split(" ").filter(Boolean)
           .map((id) => document.getElementById(id)?.textContent ?? "").join(" ").trim()
      || element.textContent.trim(),
  }))"""


def _open(gateway: FixtureGateway, open_page: OpenPage, view: str, **options: Any) -> Page:
    """The page with something in all of its parts, the lost worker and the hot expert included."""
    gateway.answers["/v1/completions"] = (200, completion(num_tokens=30))
    gateway.answers[f"/v1/traces/{TRACE_ID}"] = (200, trace())
    gateway.show(
        fleet_view(
            hot={(2, 5): 900.0, (1, 1): 500.0, (0, 3): 700.0, (3, 4): 300.0, (3, 5): 600.0},
            states={"expert-2": "lost", "expert-3": "draining"},
            slow_requests=[slow_request("req-1", trace_id=TRACE_ID, duration_s=4.0)],
            admin=True,
        )
    )
    page = open_page({"load": "", "trace": f"#trace={TRACE_ID}"}.get(view, f"#{view}"), **options)
    expect(page.locator("#connection-text")).to_have_text("Live")
    if view == "load":
        expect(page.locator("td.cell.hot").first).to_be_visible()
    elif view == "routing":
        page.get_by_role("button", name="Run").click()
        expect(page.locator(".token").first).to_be_visible()
        page.get_by_text("As a table").click()
    else:
        page.locator(".step summary").click()
        expect(page.locator(".layers")).to_be_visible()
    return page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("view", VIEWS)
def test_all_text_has_the_contrast_of_level_aa(
    gateway: FixtureGateway, open_page: OpenPage, view: str, scheme: str
) -> None:
    page = _open(gateway, open_page, view, color_scheme=scheme, reduced_motion="reduce")
    found = page.evaluate(CONTRASTS)
    assert len(found) > 30
    assert [text for text in found if text["ratio"] < 4.5] == []


@pytest.mark.parametrize("view", VIEWS)
def test_everything_that_can_be_operated_has_a_name(
    gateway: FixtureGateway, open_page: OpenPage, view: str
) -> None:
    page = _open(gateway, open_page, view)
    found = page.evaluate(NAMES)
    named = ("button", "input", "textarea", "a", "summary", "section")
    wanted = [e for e in found if e["tag"] in named or e["role"] in ("grid", "table", "listbox")]
    assert len(wanted) > 10
    assert [element["html"] for element in wanted if not element["name"]] == []


def test_landmarks_and_headings_are_in_order(gateway: FixtureGateway, open_page: OpenPage) -> None:
    page = _open(gateway, open_page, "load")
    for role in ("banner", "main"):
        expect(page.get_by_role(role)).to_have_count(1)
    expect(page.get_by_role("navigation", name="Views")).to_be_visible()
    expect(page.get_by_role("heading", level=1)).to_have_text("expertfleet")
    for name in ("Load of experts", "Hottest experts", "Workers", "Attention shards"):
        expect(page.get_by_role("region", name=name)).to_be_visible()
    assert page.locator("html").get_attribute("lang") == "en"


def test_the_map_is_a_grid_with_headers_for_a_screen_reader(
    gateway: FixtureGateway, open_page: OpenPage
) -> None:
    page = _open(gateway, open_page, "load")
    grid = page.get_by_role("grid", name="Load of experts")
    expect(grid.get_by_role("columnheader", name="Expert 5")).to_have_count(1)
    expect(grid.get_by_role("rowheader", name="Layer 2")).to_have_count(1)
    cell = grid.get_by_role("gridcell", name="900")
    expect(cell).to_have_attribute("title", "Layer 2, expert 5: 900 tokens/s, hot, 1 ready replica")


def test_tables_stay_tables_where_they_look_like_cards(
    gateway: FixtureGateway, open_page: OpenPage
) -> None:
    page = _open(gateway, open_page, "load", width=390, height=844)
    table = page.get_by_role("table", name="Workers")
    expect(table.get_by_role("row")).to_have_count(1 + 4)
    expect(table.get_by_role("rowheader")).to_have_count(4)
    expect(table.get_by_role("cell", name="cpu on node-1")).to_have_count(1)


@pytest.mark.parametrize("view", VIEWS)
def test_the_page_never_scrolls_sideways(
    gateway: FixtureGateway, open_page: OpenPage, view: str
) -> None:
    page = _open(gateway, open_page, view)
    for width in (1440, 768, 390, 360):
        page.set_viewport_size({"width": width, "height": 800})
        page.wait_for_function(f"() => innerWidth === {width}")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for link in ("Load", "Routing", "Traces"):
            box = page.get_by_role("link", name=link, exact=True).bounding_box()
            assert box is not None
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= width


def test_the_keyboard_reaches_everything_and_the_focus_is_seen(
    gateway: FixtureGateway, open_page: OpenPage
) -> None:
    page = _open(gateway, open_page, "load")
    seen: list[str] = []
    for _ in range(60):
        page.keyboard.press("Tab")
        element = page.evaluate(
            "(e => ({ what: e.id || e.textContent.trim().slice(0, 40) || e.value, tag: e.tagName,"
            " outline: getComputedStyle(e.type === 'radio' ? e.nextSibling : e).outlineStyle }))"
            "(document.activeElement)"
        )
        if element["tag"] == "BODY":
            break
        assert element["outline"] != "none", element
        seen.append(element["what"])
    for wanted in ("Skip to content", "Load", "Routing", "Traces", "theme", "req-1", "Drain"):
        assert wanted in seen, seen
    assert any("900" in what for what in seen) or "100" in seen  # one stop in the map
    assert sum("of layer" in what for what in seen) == 8  # the hottest experts


def test_the_theme_follows_the_system_and_the_choice_outlives_a_reload(
    gateway: FixtureGateway, open_page: OpenPage
) -> None:
    gateway.show(fleet_view())
    page = open_page(color_scheme="dark")

    def background() -> int:
        color = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        return sum(int(value) for value in color[4:-1].split(","))

    dark = background()
    assert dark < 150
    page.emulate_media(color_scheme="light")
    light = background()
    assert light > 600
    button = page.get_by_role("button", name="Theme")
    button.click()
    button.click()
    expect(button).to_have_text("Theme: dark")
    assert background() == dark
    page.reload()
    assert background() == dark
    expect(button).to_have_text("Theme: dark")


def test_nothing_moves_for_who_asked_for_stillness(
    gateway: FixtureGateway, open_page: OpenPage
) -> None:
    page = _open(gateway, open_page, "load", reduced_motion="reduce")
    moving = page.evaluate(
        "[...document.querySelectorAll('*')].filter(e =>"
        " parseFloat(getComputedStyle(e).transitionDuration) > 0"
        " || getComputedStyle(e).animationName !== 'none').length"
    )
    assert moving == 0


def test_status_is_announced_sparingly(gateway: FixtureGateway, open_page: OpenPage) -> None:
    page = _open(gateway, open_page, "load")
    page.evaluate(
        """() => {
          window.spoken = [];
          const live = "[role=status], [role=alert], [aria-live]";
          new MutationObserver((changes) => {
            for (const { target } of changes) {
              const region = (target.nodeType === 1 ? target : target.parentElement)?.closest(live);
              if (region) window.spoken.push(region.textContent);
            }
          }).observe(document.body, { subtree: true, childList: true, characterData: true });
        }"""
    )
    for rate in (10.0, 20.0, 30.0):
        view = fleet_view(rate=rate, states={"expert-2": "lost", "expert-3": "draining"})
        gateway.show(view)
        expect(page.locator('td.cell[data-layer="0"][data-expert="0"] .value')).to_have_text(
            f"{rate:.0f}"
        )
    assert page.evaluate("window.spoken") == []
