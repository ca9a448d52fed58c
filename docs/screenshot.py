"""README's picture: what a report shows of diversity and data, as Chromium draws it.

python docs/screenshot.py runs/demo/report.html docs/report.png
"""

import sys

from playwright.sync_api import sync_playwright

WIDTH, HEIGHT = 1200, 800
LEFT_OUT = "section:has(#curves), section:has(#samples), section:last-of-type, section:has(#semantic) .scroll"


def main(html: str, png: str) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.goto(f"file://{html}" if html.startswith("/") else f"file://{sys.path[0]}/../{html}")
        page.wait_for_selector("html[data-ready=yes]", state="attached")
        page.wait_for_selector("#map .point")
        page.add_style_tag(content=f"{LEFT_OUT} {{ display: none }}")
        page.select_option("#prompt", index=3)
        page.locator("#map .point").last.click(force=True)
        page.mouse.move(0, 0)
        page.screenshot(path=png, full_page=True)
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
