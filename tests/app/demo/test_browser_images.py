"""The page with a model of images: no frames, pictures to compare, and a look inside one."""

import re

import pytest

from tests.app.demo.conftest import LONG
from tests.app.demo.steps import pixels, tab

expect = pytest.importorskip("playwright.sync_api").expect
expect.set_options(timeout=LONG)

DONE = "studio-stage[kind={}] studio-player[data-ready=yes]"


def choose_images(page, kind: str) -> None:
    """Picks the tiny model of images, and DraftAttention with blocks of 64, in a tab."""
    page.locator("#model input").click()
    page.get_by_role("option", name="tiny-flux", exact=True).click()
    page.wait_for_selector(f"studio-methods[kind={kind}][data-model=tiny-flux]")
    page.wait_for_function("document.querySelector('#size input').value === '32x48'")
    form = page.locator(f"studio-methods[kind={kind}] studio-method").first
    form.locator("select").first.select_option("draft")
    form.locator("summary").first.click()
    form.get_by_label("block", exact=True).select_option("64")


def test_images_are_compared(open_page):
    page = open_page()
    tab(page, "Compare")
    expect(page.locator("#frames")).to_be_visible()
    choose_images(page, "compare")
    expect(page.locator("#frames")).to_be_hidden()
    methods = page.locator("studio-methods[kind=compare] studio-method")
    # What this model refuses is not offered, and the second method needs no file.
    expect(methods.first.locator("option", has_text=re.compile("^Radial$"))).to_have_count(0)
    expect(methods.nth(1).locator("select").first).not_to_have_value(re.compile("paro|sparse-vdit"))
    methods.nth(1).get_by_label("Remove this method").click()
    page.locator("#start-compare").click()
    page.wait_for_selector(DONE.format("compare"))
    card = page.locator("studio-results")
    expect(card).to_contain_text("an image of 32x48")
    expect(card.locator("tbody tr")).to_have_text([re.compile("^dense"), re.compile("^draft")])
    expect(card.locator("thead")).not_to_contain_text("VMAF")
    expect(page.locator("studio-player canvas")).to_have_count(2)
    expect(page.locator(".st-transport")).to_have_count(0)
    sides = [pixels(page, f"studio-player figure:nth-child({n}) canvas") for n in (1, 2)]
    assert len(set(sides[0])) > 2 and sides[0] != sides[1]
    # Keys that step through frames do nothing; those of the views do.
    page.locator("h1").click()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("2")
    half = pixels(page, "studio-player canvas")
    width = 4 * 48
    assert half[: width // 2] == sides[0][: width // 2]
    assert half[width // 2 : width] == sides[1][width // 2 : width]
    page.keyboard.press("3")
    apart = pixels(page, "studio-player canvas")
    assert max(apart[i] for i in range(len(apart)) if i % 4 != 3) > 0
    expect(page.locator("studio-player")).not_to_contain_text("codec")
    with page.expect_download() as download:
        card.get_by_role("link", name="side by side").click()
    assert download.value.suggested_filename == "side_by_side.png"
    # Back to a model of videos, there are frames again.
    page.locator("#model input").click()
    page.get_by_role("option", name="tiny", exact=True).click()
    expect(page.locator("#frames")).to_be_visible()
    expect(page.locator("#frames input[type=number]")).to_have_value("9")


def test_look_inside_an_image(open_page):
    page = open_page()
    tab(page, "Look inside")
    choose_images(page, "inspect")
    page.locator("#start-inspect").click()
    page.wait_for_selector("studio-inspect[data-ready=yes]")
    expect(page.locator(".st-frames canvas")).to_have_count(1)
    page.locator(".st-frames canvas").hover(position={"x": 2, "y": 2})
    said = page.locator("studio-inspect .st-views p")
    expect(said).to_contain_text("Token 0 (frame 0, y 0, x 0) sees ")
    assert len(set(pixels(page, ".st-frames canvas"))) > 2
