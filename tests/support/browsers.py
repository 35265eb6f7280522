"""A real headless Chromium, and pages that remember what went wrong and where their requests went."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
LIMIT_S = 30.0
"""For anything to appear on a page, on two busy cores; nearly always a second."""

DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}

COVERED = """cover => [...document.querySelectorAll("button, a, input, select, summary")].filter((control) => {
  const { left, top, width, height } = control.getBoundingClientRect();
  const there = width && document.elementFromPoint(left + width / 2, top + height / 2);
  return there && cover.contains(there) && !cover.contains(control);
}).map((control) => control.ariaLabel || control.textContent)"""


class Watched:
    """A page. ``errors``: console errors, uncaught exceptions and failed answers so far; ``requests``: all URLs."""

    def __init__(self, page: Any, origin: str) -> None:
        self.page, self.origin = page, origin
        self.errors: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: message.type == "error" and self.errors.append(message.text))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))

    def open(self, route: str) -> None:
        """Go to a route such as ``/runs``."""
        self.page.goto(f"{self.origin}/#{route}")

    def shows(self, selector: str, text: str | None = None, *, limit_s: float = LIMIT_S) -> Any:
        """Wait for a visible element, with this text in it; returns its locator."""
        found = self.page.locator(selector) if text is None else self.page.locator(selector, has_text=text)
        found.first.wait_for(state="visible", timeout=1000 * limit_s)
        return found.first

    def text(self, selector: str) -> str:
        return str(self.page.locator(selector).first.text_content())

    def wait_until(self, what: str, condition: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
        end = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < end, f"not seen within {limit_s:g} s: {what}; errors: {self.errors}"
            self.page.wait_for_timeout(50)

    def expect_errors(self, *texts: str) -> None:
        """There were errors, each with one of these texts; they are forgiven."""
        assert self.errors and all(any(text in error for text in texts) for error in self.errors), self.errors
        self.errors.clear()

    def strangers(self) -> list[str]:
        """Requests that went elsewhere than to the service."""
        home = urlsplit(self.origin)
        return [
            url
            for url in self.requests
            if urlsplit(url).scheme not in ("data", "blob") and urlsplit(url)[:2] != (home.scheme, home.netloc)
        ]

    def covered(self, selector: str) -> list[str]:
        """Controls in view that lie under this element, which would take their clicks."""
        return list(self.page.eval_on_selector(selector, COVERED))

    def overflow(self) -> int:
        """Pixels by which the page is wider than the window."""
        return int(self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A browser, or a skip where there is none."""
    if not CHROMIUM.exists():
        pytest.skip(f"no {CHROMIUM}; install Debian's package chromium to test the pages")
    playwright = pytest.importorskip("playwright.sync_api", reason="the pages are tested with playwright")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield browser
        browser.close()


@contextlib.contextmanager
def watched(
    browser: Any, origin: str, *, phone: bool = False, dark: bool = False, calm: bool = False
) -> Iterator[Watched]:
    """A page in a context of its own: nothing is remembered from others. It must end without an error that nobody
    expected, and without a request to anybody else. ``calm``: the reader prefers reduced motion.
    """
    context = browser.new_context(
        viewport=PHONE if phone else DESKTOP,
        is_mobile=phone,
        has_touch=phone,
        color_scheme="dark" if dark else "light",
        reduced_motion="reduce" if calm else "no-preference",
    )
    page = Watched(context.new_page(), origin.rstrip("/"))
    try:
        yield page
        assert page.errors == [], page.errors
        assert page.strangers() == [], page.strangers()
    finally:
        context.close()
