"""A page in headless Chromium, for tests of what people see.

    import browser

    chromium, page = browser.chromium, browser.page  # makes the fixtures known to the test file

    def test_button(page):
        page.goto(path.as_uri())
        page.click("text=Next")
        assert page.problems == []

`page` is a page of playwright (https://playwright.dev/python) with the further attribute `problems`: what the console
reports as an error, uncaught exceptions, and requests to other machines, as text. Other machines are out of reach, so
that nothing depends on a network. Without playwright or a browser of the system the tests that use it are skipped.
"""

import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
OWN_SCHEMES = ("file", "data", "blob", "about")
OWN_HOSTS = ("127.0.0.1", "localhost")


@pytest.fixture(scope="module")
def chromium() -> Iterator["Browser"]:
    """The browser, started once per test file: while it runs, no other event loop can run in this thread."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (requirements-dev.txt)")
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip(f"needs a browser: none of {', '.join(BROWSERS)} is installed")
    others = ", ".join(f"EXCLUDE {host}" for host in OWN_HOSTS)
    arguments = ["--no-sandbox", f"--host-resolver-rules=MAP * ~NOTFOUND, {others}"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: "Browser") -> Iterator["Page"]:
    """An empty page of 1280 x 900 pixels that accepts downloads."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    context.set_default_timeout(15_000)
    page = context.new_page()
    page.problems = []
    page.on("console", lambda note: page.problems.append(note.text) if note.type == "error" else None)
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("request", lambda request: page.problems.extend(_leaving(request.url)))
    yield page
    context.close()


def _leaving(url: str) -> list[str]:
    """The address as a problem, when it belongs to another machine."""
    parts = urlsplit(url)
    own = parts.scheme in OWN_SCHEMES or parts.hostname in OWN_HOSTS
    return [] if own else [f"request to another machine: {url}"]
