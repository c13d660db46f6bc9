"""A browser for the tests of the page."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.pages import find_browser
from tests.studio import WAIT_MS

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    pytest.importorskip("playwright", reason="playwright is not installed; it comes with the extra `dev`")
    from playwright.sync_api import expect, sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
        expect.set_options(timeout=WAIT_MS)
        yield browser
        browser.close()
