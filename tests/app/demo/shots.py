"""Makes the pictures of docs/demo.md from a studio that runs, with the bundled model.

    vdit-sparse demo &
    python -m tests.app.demo.shots http://127.0.0.1:7860 docs/images

Takes six minutes on two CPU cores with AVX512-BF16, ten on two with AVX2. Look at the pictures
before you commit them.
"""

import shutil
import sys
import time
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

METHODS = ("draft-mini", "radial-mini")
PATIENCE = 3_600_000


def main(address: str, folder: Path) -> None:
    """Compares, looks inside and goes back on a phone; three pictures."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        context = browser.new_context(viewport={"width": 1300, "height": 900})
        page = opened(context.new_page(), address)
        page.get_by_role("tab", name="Compare").click()
        for number, method in enumerate(METHODS):
            form = page.locator("studio-methods[kind=compare] studio-method").nth(number)
            form.locator("select").first.select_option(method)
        start = time.monotonic()
        page.locator("#start-compare").click()
        page.wait_for_selector(".st-live", timeout=60_000)
        page.wait_for_selector("studio-stage[kind=compare] studio-player[data-ready=yes]")
        print(f"dense, {' and '.join(METHODS)} compared in {time.monotonic() - start:.0f} s")
        shoot(page, folder / "studio-compare.png")
        page.get_by_role("tab", name="Look inside").click()
        page.locator("studio-methods[kind=inspect] select").first.select_option("draft-mini")
        page.locator("#start-inspect").click()
        page.wait_for_selector("studio-inspect[data-ready=yes]")
        shoot(page, folder / "studio-inside.png")
        small = browser.new_context(
            viewport={"width": 390, "height": 844},
            color_scheme="dark",
            is_mobile=True,
            storage_state={"cookies": context.cookies()},
        )
        phone = opened(small.new_page(), address)
        phone.get_by_role("tab", name="Compare").click()
        phone.wait_for_selector("studio-stage[kind=compare] studio-player[data-ready=yes]")
        phone.locator("studio-player").scroll_into_view_if_needed()
        phone.get_by_role("button", name="Wipe").click()
        phone.locator("studio-results").screenshot(path=folder / "studio-phone.png")


def opened(page: Page, address: str) -> Page:
    """The page, with its forms filled in."""
    page.set_default_timeout(PATIENCE)
    page.goto(address)
    page.wait_for_selector("studio-methods studio-method")
    page.wait_for_function("document.querySelector('#size input').value !== ''")
    page.wait_for_timeout(500)
    return page


def shoot(page: Page, file: Path) -> None:
    """The right-hand side, a second after it came."""
    page.wait_for_timeout(1000)
    page.locator("#how").screenshot(path=file)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
