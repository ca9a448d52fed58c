"""A page of `ddpo report` in Debian's Chromium, watched: what it says, and what it asks the network for."""

import os
import shutil
from contextlib import contextmanager

import pytest

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update"
need_browser = pytest.mark.skipif(
    not os.path.exists(CHROMIUM) and not os.environ.get("CI"), reason="chromium is not installed"
)


class Watched:
    """A browser page; complaints: errors, console messages, dialogs, requests to anywhere but the file itself."""

    def __init__(self, page, path):
        self.page, self.complaints = page, []
        page.set_default_timeout(30_000)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("dialog", lambda dialog: (self.complaints.append(dialog.message), dialog.dismiss()))
        page.on("request", self._request)
        self._url = f"file://{path}"
        page.goto(self._url)
        page.wait_for_selector("html[data-ready=yes]", state="attached")

    def _request(self, request):
        if request.url != self._url and not request.url.startswith(("data:", "blob:")):
            self.complaints.append(request.url)


@contextmanager
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        try:
            yield lambda path, width=1400, scheme="light": Watched(
                chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme), path
            )
        finally:
            chromium.close()
