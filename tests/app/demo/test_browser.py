"""The page in a real browser: headless Chromium, driven by Playwright, and a tiny model.

Skipped where Playwright or a Chromium is not installed (`pip install playwright`, and Debian's
package `chromium`).
"""

import re
import shutil

import pytest

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here")

DONE = "studio-stage[kind={}] studio-player[data-ready=yes]"
LONG = 120_000


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def open_page(browser, served):
    """Opens the page as a new user, or with `context=` as one who was here; what the browser
    complains about, and every address that is not the studio's, fails the test."""
    contexts, wrong = [], []

    def watched(context):
        page = context.new_page()
        page.set_default_timeout(LONG)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        own = (served[0], "data:", "blob:")
        page.on("request", lambda request: request.url.startswith(own) or wrong.append(request.url))
        page.goto(served[0])
        page.wait_for_selector("studio-methods[kind=bench], studio-methods studio-method")
        return page

    def opened(context=None, **options):
        if context is None:
            context = browser.new_context(viewport={"width": 1300, "height": 900}, **options)
            contexts.append(context)
        return watched(context)

    yield opened
    for context in contexts:
        context.close()
    assert not wrong


def choose_tiny(page, kind: str, methods: list[str]) -> None:
    """Picks the tiny model, and methods with blocks of 64, in a tab."""
    page.locator("#model input").click()
    page.get_by_role("option", name="tiny", exact=True).click()
    page.wait_for_function("document.querySelector('#size input').value === '32x64'")
    for number, name in enumerate(methods):
        form = page.locator(f"studio-methods[kind={kind}] studio-method").nth(number)
        form.locator("select").first.select_option(name)
        form.locator("summary").first.click()
        form.get_by_label("block", exact=True).select_option("64")


def tab(page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def pixels(page, selector: str) -> list[int]:
    """The colours of a canvas, as the browser shows them."""
    read = "c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"
    return page.locator(selector).first.evaluate(read)


def test_generate_reload_and_open_again(open_page):
    page = open_page()
    choose_tiny(page, "generate", ["radial"])
    page.fill("#prompt textarea", "a cat runs")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(DONE.format("generate"))
    card = page.locator("studio-results")
    assert "a cat runs" in card.inner_text() and "density" in card.inner_text()
    assert "--set block=64" in card.locator("pre").first.text_content()
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
    assert open_page().locator(".st-tile").count() == 0


def test_cancel_and_reload_while_it_runs(open_page, served):
    page = open_page()
    choose_tiny(page, "generate", ["radial"])
    page.locator("#steps input[type=number]").fill("100")
    page.keyboard.press("Tab")
    page.locator("#frames input[type=number]").fill("81")
    page.keyboard.press("Tab")
    page.locator("#start-generate").click()
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
    page.locator("#start-compare").click()
    page.wait_for_selector(DONE.format("compare"))
    expect(page.locator("studio-player canvas")).to_have_count(3)
    rows = page.locator("studio-results tbody tr").all_inner_texts()
    assert [re.split(r"\s", row)[0] for row in rows] == ["dense", "radial", "draft"]
    # All are at the same frame, however they are moved.
    page.locator(".st-scrub").focus()
    page.get_by_label("One frame on").click()
    before = page.locator(".st-transport .st-counter").inner_text()
    page.keyboard.press("ArrowRight")
    assert page.locator(".st-transport .st-counter").inner_text() != before
    side = [pixels(page, f"studio-player figure:nth-child({n}) canvas") for n in (1, 3)]
    page.keyboard.press("2")
    page.get_by_label("Second video").select_option("2")
    line = page.get_by_role("slider", name="Wipe")
    half = pixels(page, "studio-player canvas")
    width = 4 * 64
    assert half[: width // 2] == side[0][: width // 2]
    assert half[width // 2 : width] == side[1][width // 2 : width]
    screen = page.locator(".st-screen")
    screen.click(position={"x": screen.bounding_box()["width"] - 3, "y": 60})
    assert int(line.get_attribute("aria-valuenow")) >= 98
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
    page.locator("#start-inspect").click()
    page.wait_for_selector("studio-inspect[data-ready=yes]")
    expect(page.locator(".st-frames canvas")).to_have_count(3)
    page.locator(".st-frames canvas").nth(1).hover(position={"x": 2, "y": 2})
    said = page.locator("studio-inspect .st-views p")
    # 2 x 4 tokens a frame.
    assert said.inner_text().startswith("Token 8 (frame 1, y 0, x 0) sees ")
    page.locator(".st-map").first.hover(position={"x": 5, "y": 5})
    assert "attention 1.0000" in said.inner_text()
    page.get_by_role("button", name="layer 1, head 1").click()
    assert page.get_by_label("Head", exact=True).input_value() == "1"
    page.get_by_role("button", name="Order of the tokens").click()
    assert len(set(pixels(page, ".st-frames canvas"))) > 2


def test_errors_are_words_in_place(open_page):
    page = open_page()
    choose_tiny(page, "generate", ["radial"])
    page.fill("#prompt textarea", "")
    page.locator("#start-generate").click()
    page.wait_for_selector(".st-failed")
    assert "Prompt is empty: describe the video" in page.locator(".st-failed").inner_text()
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
        page.wait_for_timeout(150)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, name
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", dark)[:3])) < 200) == (scheme == "dark")
    page.get_by_label("Light or dark").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != dark


def test_shortcuts_are_listed(open_page):
    page = open_page()
    page.locator("h1").click()
    page.keyboard.press("?")
    assert "start what the open tab does" in page.locator("dialog").inner_text()
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog", state="detached")
