"""A browser for all tests of the page, and the gateway that it looks at.

The browser lives as long as this folder's tests: its event loop must not stand in others' way.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.browser.fixture_gateway import FixtureGateway, running_gateway

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
PATIENCE_MS = 60_000

try:
    from playwright.sync_api import Browser, Page, expect, sync_playwright
except ImportError:  # optional: pip install playwright
    pytest.skip("playwright is not installed", allow_module_level=True)

OpenPage = Callable[..., Page]
"""Opens the page: `open_page(hash="", width=1280, height=900, **options of a context)`."""


def chromium_path() -> str | None:
    return next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    path = chromium_path()
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(CHROMIUM_NAMES)} is on the path")
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def _gateway() -> Iterator[FixtureGateway]:
    with running_gateway() as gateway:
        yield gateway


@pytest.fixture
def gateway(_gateway: FixtureGateway) -> FixtureGateway:
    _gateway.reset()
    return _gateway


@pytest.fixture
def open_page(browser: Browser, gateway: FixtureGateway) -> Iterator[OpenPage]:
    """Fails the test when the page threw, logged an error or broke its content security policy."""
    contexts = []
    problems: list[str] = []

    def open_it(hash: str = "", *, width: int = 1280, height: int = 900, **options: Any) -> Page:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        context.set_default_timeout(PATIENCE_MS)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: _note(message, problems))
        page.goto(f"{gateway.url}/{hash}")
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert problems == []


def _note(message: Any, problems: list[str]) -> None:
    # The browser itself logs every refused request; those are what some tests are about.
    if message.type == "error" and "Failed to load resource" not in message.text:
        problems.append(message.text)
