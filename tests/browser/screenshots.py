"""Pictures of the page for the docs, from a started product under load.

`python -m tests.browser.screenshots [folder]`, by default docs/images.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.browser.conftest import chromium_path
from tests.browser.heat import everyday_load, heating, hot_cell
from tests.support.product import REPOSITORY, Product

PATIENCE_MS = 180_000
DESKTOP = (1440, 900)
PHONE = (390, 844)
ROUNDS = (300, 500, 700, 900, 1100)


def main(folder: Path) -> None:
    path = chromium_path()
    if path is None:
        sys.exit("no chromium on the path")
    folder.mkdir(parents=True, exist_ok=True)
    expect.set_options(timeout=PATIENCE_MS)
    with (
        tempfile.TemporaryDirectory() as state,
        sync_playwright() as playwright,
    ):
        product = Product(
            Path(state) / "state",
            "--workers",
            "4",
            "--no-ray",
            environment={"EXPERTFLEET_STEP_SAMPLE_INTERVAL": "2"},
        ).start()
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            _measure(product, _open(browser, product, DESKTOP, "light"))
            _load(browser, product, folder)
            _routing_and_trace(browser, product, folder)
        finally:
            browser.close()
            product.stop()


def _measure(product: Product, page: Page) -> None:
    """Print how long after the first request a hot expert is seen, once per token."""
    delays_s = []
    for token_id in ROUNDS:
        cell = hot_cell(page, product, token_id)
        with heating(product.url, token_id):
            began = time.monotonic()
            expect(cell).to_have_class(re.compile(r"\bhot\b"))
            delays_s.append(time.monotonic() - began)
    print("seconds until a hot expert was seen:", ", ".join(f"{s:.2f}" for s in delays_s))


def _load(browser: Browser, product: Product, folder: Path) -> None:
    pages = {
        "console-load-light.png": _open(browser, product, DESKTOP, "light"),
        "console-load-dark.png": _open(browser, product, DESKTOP, "dark"),
        "console-load-phone.png": _open(browser, product, PHONE, "light"),
    }
    lines = (REPOSITORY / "docs" / "architecture.md").read_text().splitlines()
    texts = [line for line in lines if len(line) > 80]
    with everyday_load(product.url, texts), heating(product.url, ROUNDS[0], num_clients=1):
        for page in pages.values():
            expect(page.locator("td.cell.hot").first).to_be_visible()
        time.sleep(15)  # so that the line of the rate has something to show
        for name, page in pages.items():
            page.screenshot(path=folder / name)
            page.context.close()


def _routing_and_trace(browser: Browser, product: Product, folder: Path) -> None:
    for size, scheme, suffix in ((DESKTOP, "dark", "dark"), (PHONE, "light", "phone")):
        page = _open(browser, product, size, scheme)
        page.get_by_role("link", name="Routing").click()
        page.get_by_role("button", name="Run").click()
        page.locator(".token").nth(20).click()
        page.get_by_role("slider").fill("2")
        page.screenshot(path=folder / f"console-routing-{suffix}.png", full_page=size is DESKTOP)
        page.get_by_role("link", name="Its trace").click()
        page.locator(".step summary").first.click()
        page.screenshot(path=folder / f"console-trace-{suffix}.png")
        page.context.close()


def _open(browser: Browser, product: Product, size: tuple[int, int], scheme: str) -> Page:
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]},
        color_scheme="dark" if scheme == "dark" else "light",
        reduced_motion="reduce",
    )
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    page.goto(product.url)
    expect(page.locator("#connection-text")).to_have_text("Live")
    return page


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else REPOSITORY / "docs" / "images")
