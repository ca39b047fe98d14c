"""A real browser for the tests of pages: Chromium, driven by Playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from frameworks import require

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_ARGUMENTS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
NARROW = 420  # pixels of a small telephone


@contextmanager
def chromium() -> Iterator[Any]:
    """A running Chromium, or a skip where there is none; in CI that is a failure."""
    playwright = require("playwright.sync_api")
    path = next(filter(None, map(shutil.which, _NAMES)), None)
    if path is None:
        if os.environ.get("CI"):
            pytest.fail("Chromium is not installed, and CI must test the pages in a browser: .ci/browser installs it")
        pytest.skip("Chromium is not installed: apt-get install chromium")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=list(_ARGUMENTS))
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, path: Path, *, width: int = 1200, **options: Any) -> Iterator[Any]:
    """A page of a file in a window of that width; it must have raised no error and asked for nothing else."""
    context = browser.new_context(viewport={"width": width, "height": 900}, **options)
    page, faults = context.new_page(), []
    page.set_default_timeout(30_000)
    page.on("console", lambda message: faults.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: faults.append(f"error: {error}"))
    page.on("request", lambda request: faults.append(request.url) if request.url != path.as_uri() else None)
    page.goto(path.as_uri())
    yield page
    context.close()
    assert faults == []


def wider_by(page: Any) -> int:
    """Pixels by which the page is wider than its window: 0, or the whole page scrolls sideways."""
    pixels: int = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    return pixels


_COLOURS = "x => [getComputedStyle(x).color, getComputedStyle(x).backgroundColor]"


def require_readable(browser: Any, text: str, folder: Path) -> None:
    """A page without a script fits a telephone, has its verdict in front, and has ink on paper, light and dark."""
    path = folder / "page.html"
    path.write_text(text, encoding="utf-8")
    with opened(browser, path, width=NARROW) as page:
        assert wider_by(page) == 0
        assert page.evaluate("document.body.firstElementChild.tagName") == "H1"
        assert page.locator(".scroll:not([tabindex='0'])").count() == 0  # keys scroll what is wider than the window
        colours = []
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            ink, paper = page.locator("body").evaluate(_COLOURS)
            assert page.locator("svg text").first.evaluate("x => getComputedStyle(x).fill") == ink
            colours += [ink, paper]
        assert len(set(colours)) == 4
