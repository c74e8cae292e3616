"""The page in a real browser: headless Chromium, driven by Playwright, and a tiny model.

Skipped where Playwright or a Chromium is not installed (`pip install playwright`, and Debian's
package `chromium`).
"""

import re

import pytest

from tests.app.demo.conftest import LONG
from tests.app.demo.steps import choose_tiny, pixels, start_long, tab

expect = pytest.importorskip("playwright.sync_api").expect
expect.set_options(timeout=LONG)

DONE = "studio-stage[kind={}] studio-player[data-ready=yes]"


def test_generate_reload_and_open_again(open_page):
    page = open_page()
    choose_tiny(page, "generate", ["radial"])
    page.fill("#prompt textarea", "a cat runs")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(DONE.format("generate"))
    card = page.locator("studio-results")
    expect(card).to_contain_text("a cat runs")
    expect(card).to_contain_text("density")
    expect(card.locator("pre").first).to_contain_text("--set block=64")
    assert len(set(pixels(page, "studio-player canvas"))) > 2
    with page.expect_download() as download:
        card.get_by_role("link", name="radial.mp4").click()
    assert download.value.suggested_filename == "radial.mp4"
    expect(page.locator(".st-tile")).to_have_count(1)
    again = open_page(page.context)
    again.wait_for_selector(DONE.format("generate"))
    tab(again, "Compare")
    again.locator(".st-open").click()
    again.wait_for_selector("studio-stage[kind=generate] studio-results", state="visible")
    again.locator(".st-tile").hover()
    again.get_by_label("Delete this run").click()
    again.wait_for_selector("studio-stage[kind=generate] .st-empty")
    expect(again.locator(".st-tile")).to_have_count(0)
    # Another user sees none of it.
    stranger = open_page()
    expect(stranger.locator("studio-gallery")).to_contain_text("What you make stays here")
    expect(stranger.locator(".st-tile")).to_have_count(0)


def test_cancel_and_reload_while_it_runs(open_page, served):
    page = open_page()
    start_long(page)
    page.wait_for_function("/step [1-9]\\d* of 100/.test(document.body.innerText)")
    page.wait_for_selector(".st-preview:not([hidden])")
    other = open_page(page.context)
    other.wait_for_selector("studio-stage[kind=generate] .st-live")
    other.keyboard.press("Escape")
    other.wait_for_selector("text=The run was stopped")
    page.wait_for_selector("text=The run was stopped")
    assert not [job for job in served[1].worker.jobs.values() if job.state == "running"]


def test_compare_wipe_and_difference(open_page):
    page = open_page()
    tab(page, "Compare")
    choose_tiny(page, "compare", ["radial", "draft"])
    page.locator("#size input").fill("64x256")
    page.locator("#start-compare").click()
    page.wait_for_selector(DONE.format("compare"))
    expect(page.locator("studio-player canvas")).to_have_count(3)
    names = [re.compile(f"^{name}") for name in ("dense", "radial", "draft")]
    expect(page.locator("studio-results tbody tr")).to_have_text(names)
    # All are at the same frame, however they are moved.
    page.locator(".st-scrub").focus()
    page.get_by_label("One frame on").click()
    counter = page.locator(".st-transport .st-counter")
    expect(page.get_by_label("Play or pause")).to_have_text("▶")
    before = int(counter.inner_text().split()[0])
    page.keyboard.press("ArrowRight")
    expect(counter).to_have_text(f"{before % 9 + 1} / 9")
    side = [pixels(page, f"studio-player figure:nth-child({n}) canvas") for n in (1, 3)]
    page.keyboard.press("2")
    page.get_by_label("Second video").select_option("2")
    line = page.get_by_role("slider", name="Wipe")
    half = pixels(page, "studio-player canvas")
    width = 4 * 256
    assert half[: width // 2] == side[0][: width // 2]
    assert half[width // 2 : width] == side[1][width // 2 : width]
    screen = page.locator(".st-screen")
    screen.click(position={"x": screen.bounding_box()["width"] - 3, "y": 60})
    expect(line).to_have_attribute("aria-valuenow", re.compile("98|99|100"))
    page.keyboard.press("3")
    apart = pixels(page, "studio-player canvas")
    page.get_by_label("Second video").select_option("0")
    same = pixels(page, "studio-player canvas")
    assert max(same[i] for i in range(len(same)) if i % 4 != 3) == 0
    assert max(apart[i] for i in range(len(apart)) if i % 4 != 3) > 0


def test_look_inside(open_page):
    page = open_page()
    tab(page, "Look inside")
    choose_tiny(page, "inspect", ["draft"])
    page.locator("#size input").fill("64x256")
    page.locator("#start-inspect").click()
    page.wait_for_selector("studio-inspect[data-ready=yes]")
    expect(page.locator(".st-frames canvas")).to_have_count(3)
    page.locator(".st-frames canvas").nth(1).hover(position={"x": 2, "y": 2})
    said = page.locator("studio-inspect .st-views p")
    # 4 x 16 tokens a frame.
    expect(said).to_contain_text("Token 64 (frame 1, y 0, x 0) sees ")
    # The same by keys: one to the right, one down, one frame back.
    page.locator(".st-frames").focus()
    for key in ("ArrowRight", "ArrowDown", "PageUp"):
        page.keyboard.press(key)
    expect(said).to_contain_text("Token 17 (frame 0, y 1, x 1) sees ")
    # Draft gathers the tokens of a region: both maps start in that order, of three blocks a side.
    captions, order = page.locator(".st-maps figcaption"), page.get_by_label("Order of both maps")
    expect(captions).to_have_text([re.compile("in the method's order$")] * 2)
    sides = "all => all.map((canvas) => canvas.width)"
    assert page.locator(".st-map").evaluate_all(sides) == [3, 3]
    page.locator(".st-map").first.hover(position={"x": 5, "y": 5})
    expect(said).to_contain_text(re.compile(r"blocks 0 and 0: attention 0\.\d"))
    order.get_by_role("button", name="The video's order").click()
    expect(captions).to_have_text([re.compile("in the order of the video$")] * 2)
    expect(said).not_to_contain_text("attention")
    page.locator(".st-map").last.hover(position={"x": 5, "y": 5})
    expect(said).to_contain_text(re.compile(r"blocks 0 and 0: attention 0\.\d"))
    page.get_by_role("button", name="layer 1, head 1").click()
    expect(page.get_by_label("Head", exact=True)).to_have_value("1")
    page.get_by_role("button", name="Order of the tokens").click()
    assert len(set(pixels(page, ".st-frames canvas"))) > 2
    # What was made stays said, whatever the form is set to.
    page.locator("studio-methods[kind=inspect] select").first.select_option("radial")
    expect(page.locator(".st-used")).to_have_text("Made with draft, block=64 (DraftAttention)")


def test_errors_are_words_in_place(open_page):
    page = open_page()
    choose_tiny(page, "generate", ["radial"])
    page.fill("#prompt textarea", "")
    page.locator("#start-generate").click()
    expect(page.locator(".st-failed")).to_contain_text("Prompt is empty: describe the video")
    page.get_by_label("refresh").fill("sometimes")
    page.fill("#prompt textarea", "a cat")
    page.locator("#start-generate").click()
    page.wait_for_selector("text=refresh must be")
    assert "Traceback" not in page.content()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(open_page, scheme):
    page = open_page(is_mobile=True, has_touch=True, color_scheme=scheme)
    page.set_viewport_size({"width": 360, "height": 780})
    for name in ("Generate", "Compare", "Look inside", "Bench"):
        tab(page, name)
        expect(page.get_by_role("tab", name=name)).to_have_attribute("aria-selected", "true")
        page.wait_for_function("document.documentElement.scrollWidth <= 360")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", dark)[:3])) < 200) == (scheme == "dark")
    page.get_by_label("Light or dark").click()
    page.wait_for_function(f"getComputedStyle(document.body).backgroundColor !== {dark!r}")


def test_shortcuts_are_listed(open_page):
    page = open_page()
    page.locator("h1").click()
    page.keyboard.press("?")
    expect(page.locator("dialog")).to_contain_text("start what the open tab does")
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog", state="detached")
