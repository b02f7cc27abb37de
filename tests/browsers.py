"""A real browser, where there is one, for the tests of pages."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

# Chromium itself would ask Google for updates.
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
QUIET += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
FAKE_CAMERA = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]


@contextmanager
def open_browser() -> Iterator:
    """Start a browser that playwright drives; skip the test, saying why, where there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="pip install playwright, which drives the browser")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs a browser on the PATH: apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=QUIET + FAKE_CAMERA)
        yield browser
        browser.close()
