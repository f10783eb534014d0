"""The page at `/` in headless Chromium: fixtures and steps of its tests, which skip where there is no Chromium.

A test module takes them in with `pytest_plugins = ["page_browser"]`. Every test of `visit` or `page` ends by asking
whether the page stayed with its origin and kept its console clean.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator

import pytest
from page_server import Stub, serving

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect
expect.set_options(timeout=30_000)  # on a machine that does other things too
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
if CHROMIUM is None:
    pytest.skip("no Chromium on this machine", allow_module_level=True)

Page = playwright.Page
Visit = Callable[..., Page]
PIXELS = "willReadFrequently"  # what Chromium says to tests that read the canvas


@pytest.fixture(scope="module")  # Playwright holds an event loop as long as it runs
def browser() -> Iterator["playwright.Browser"]:
    options = ["--no-sandbox"] if os.geteuid() == 0 else []  # its sandbox refuses root
    with playwright.sync_playwright() as tools:
        found = tools.chromium.launch(executable_path=CHROMIUM, args=options)
        yield found
        found.close()


@pytest.fixture
def server() -> Iterator[Stub]:
    with serving() as stub:
        yield stub


@pytest.fixture
def allowed() -> list[str]:
    """Patterns of console errors that a test brings about itself."""
    return [PIXELS]


@pytest.fixture
def visit(browser: "playwright.Browser", server: Stub, allowed: list[str]) -> Iterator[Visit]:
    """Open the stub's page, or the one at `url`, with the options of a browser context.

    script: JavaScript that runs before the page's own.
    """
    errors: list[str] = []
    foreign: list[str] = []
    contexts = []

    def open_page(url: str = server.url, script: str = "", **options) -> Page:
        context = browser.new_context(**options)
        context.set_default_timeout(30_000)
        contexts.append(context)
        page = context.new_page()
        page.add_init_script(script)
        page.on("console", lambda m: errors.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: errors.append(str(e)))
        page.on("request", lambda r: None if r.url.startswith((url, "data:")) else foreign.append(r.url))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert foreign == []
    assert [e for e in errors if not any(re.search(pattern, e) for pattern in allowed)] == []


@pytest.fixture
def page(visit: Visit) -> Page:
    return visit()


def ask(page: Page, text: str = "Hello?") -> None:
    page.locator("#prompt").fill(text)
    page.locator("#prompt").press("Enter")


def answers(page: Page) -> "playwright.Locator":
    return page.locator("article.assistant .body")


def note(page: Page) -> "playwright.Locator":
    """The line below the last answer."""
    return page.locator("article.assistant footer span").last


def whole(page: Page, text: str) -> None:
    """The last answer is this one, and it has ended."""
    expect(answers(page).last).to_have_text(text)
    expect(page.locator("#send")).to_be_visible()


def until(page: Page, condition: str) -> None:
    """Wait for a condition (the page's own policy forbids Playwright's way of waiting, which is eval)."""
    for _ in range(600):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    pytest.fail(f"never came: {condition}")


def variable(page: Page, name: str) -> str:
    """A colour of the page's style, as a hexadecimal number."""
    return page.evaluate(f"getComputedStyle(document.documentElement).getPropertyValue('--{name}').trim()")
