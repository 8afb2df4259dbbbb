#!/usr/bin/env python3
"""The web page in a headless Chromium: light, dark, phone; keyboard alone; streaming and its stop; text that looks like markup stays text.

    pip install playwright
    python tests/serve/page.py --url http://127.0.0.1:8080 --chromium /usr/bin/chromium --shots FOLDER

Writes screenshots to look at, and exits with 1 if something is not as it should be.
"""

import argparse
import os
import sys
import time

from playwright.sync_api import sync_playwright

MARKUP = 'Say <img src=x onerror="document.title=1"> and <b>bold</b>.'


def wait(page, what, timeout=30000):
    """As wait_for_function, which the page's policy forbids: it would evaluate text inside the page."""
    end = time.time() + timeout / 1000
    while not page.evaluate(what):
        assert time.time() < end, f"this does not come true: {what}"
        time.sleep(0.05)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--url", default="http://127.0.0.1:8080")
    p.add_argument("--chromium", help="the browser; by default the one that playwright installed")
    p.add_argument("--shots", required=True)
    a = p.parse_args()
    os.makedirs(a.shots, exist_ok=True)
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=a.chromium, args=["--no-sandbox"])
        for name, scheme, size in [("light", "light", (1200, 800)), ("dark", "dark", (1200, 800)), ("phone", "light", (390, 844)), ("phone-dark", "dark", (390, 844))]:
            page = browser.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
            problems, outside = [], []
            page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
            page.on("pageerror", lambda e: problems.append(str(e)))
            page.on("request", lambda r: outside.append(r.url) if not r.url.startswith(a.url) else None)
            page.goto(a.url)
            wait(page, "document.getElementById('card').children.length > 4 && document.getElementById('live').children.length > 4")
            assert page.evaluate("document.activeElement.id") == "message", "the message has the focus"
            page.screenshot(path=os.path.join(a.shots, f"{name}-1-empty.png"), full_page=True)
            # By keyboard alone: type, Enter, wait, Escape.
            page.keyboard.type(MARKUP)
            page.keyboard.press("Shift+Enter")
            page.keyboard.type("And more.")
            page.keyboard.press("Enter")
            wait(page, "document.querySelector('#turns li.assistant .said')?.textContent.length > 20", timeout=60000)
            if name in ("light", "phone"):
                page.keyboard.press("Escape")
            wait(page, "document.getElementById('stop').disabled", timeout=120000)
            said = page.evaluate("[...document.querySelectorAll('.said')].map(e => e.textContent)")
            assert said[0] == MARKUP + "\nAnd more.", said
            assert page.evaluate("document.querySelectorAll('#turns img, #turns b').length") == 0, "markup became markup"
            assert page.title() != "1"
            # Every control is reached by Tab and has a name.
            names = page.evaluate("[...document.querySelectorAll('button, input, textarea')].map(e => e.textContent.trim() || e.labels?.[0]?.textContent.trim() || '')")
            assert all(names), names
            page.keyboard.press("Tab")
            assert page.evaluate("document.activeElement.id") == "send"
            page.screenshot(path=os.path.join(a.shots, f"{name}-2-answer.png"), full_page=True)
            wide = page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")
            assert not wide, f"{name}: the page is wider than the screen"
            # What the server refuses is shown, and the words come back.
            page.evaluate("document.querySelector('details').open = true")
            page.fill("#temperature", "9")
            page.fill("#message", "again")
            page.press("#message", "Enter")
            wait(page, "!document.getElementById('notice').hidden", timeout=30000)
            assert "temperature" in page.text_content("#notice") and page.input_value("#message") == "again"
            page.screenshot(path=os.path.join(a.shots, f"{name}-3-refused.png"), full_page=True)
            page.click("#clear")
            assert page.evaluate("document.getElementById('turns').children.length") == 0
            # The refused request is an error on the browser's console, and the only one.
            problems = [x for x in problems if "400" not in x]
            assert not problems, problems
            assert not outside, outside
            page.close()
            print(f"ok      {name}")
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
