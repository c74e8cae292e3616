"""The page in a real browser, beyond the straight way: files, results on a phone, keys, errors."""

import re

import pytest
from PIL import Image

from tests.app.demo.conftest import FORM, LONG, until
from tests.app.demo.steps import choose_tiny, start_long, tab
from vdit_sparse.app.demo import bench
from vdit_sparse.app.demo.gate import COOKIE
from vdit_sparse.app.demo.store import owner_of
from vdit_sparse.kernels.bench.problem import Shape

expect = pytest.importorskip("playwright.sync_api").expect
expect.set_options(timeout=LONG)

BENCH = {"what": "kernels", "of": "mini", "density": 0.5, "methods": ["radial"]}
FORMS = {
    "generate": {**FORM, "prompt": "averyveryverylongwordwithoutanyspaceinit and a cat"},
    "compare": {**FORM, "runs": ["dense", "radial:block=64", "draft:block=64,dense_steps=1"]},
    "inspect": {**FORM, "runs": ["draft:block=64"], "size": "64x64"},
    "bench": BENCH,
}
RESULTS = {
    "Generate": "studio-results studio-player[data-ready=yes]",
    "Compare": "studio-results studio-player[data-ready=yes]",
    "Look inside": "studio-inspect[data-ready=yes]",
    "Bench": "studio-bench .st-table",
}


@pytest.fixture
def small_bench(monkeypatch):
    monkeypatch.setattr(bench, "MINI", {"mini": Shape(1, 16, 2, 8, 8)})


def owner_on(page) -> str:
    cookies = page.context.cookies()
    return owner_of(next(cookie["value"] for cookie in cookies if cookie["name"] == COOKIE))


def made(page, desk, kind: str, form: dict):
    """A finished run of the page's user."""
    job = desk.submit(owner_on(page), kind, dict(form))
    until(lambda: desk.status(job.owner, job.name)["state"] not in ("waiting", "running"))
    assert job.state == "finished", job.error
    return job


def test_files_are_uploaded_and_used(open_page, calibration, tmp_path):
    page = open_page()
    page.get_by_role("button", name="More").click()
    place, image = page.locator("#calibration"), page.locator("#first")
    (tmp_path / "bad.safetensors").write_bytes(b"\x80\x04cposix\nsystem\n.")
    place.locator("input[type=file]").set_input_files(tmp_path / "bad.safetensors")
    expect(page.locator(".said .st-error")).to_contain_text("This file is no calibration file")
    place.get_by_label("Clear").click()
    expect(page.locator(".said .st-error")).to_have_count(0)
    place.locator("input[type=file]").set_input_files(calibration)
    expect(page.locator(".said").first).to_contain_text("PAROAttention, 3 x 8 x 8 tokens")
    choose_tiny(page, "generate", [])
    page.locator("studio-methods[kind=generate] select").first.select_option("paro")
    page.locator("#size input").fill("128x128")
    page.keyboard.press("Enter")
    page.locator("#start-generate").click()
    page.wait_for_selector(f"studio-stage[kind=generate] {RESULTS['Generate']}")
    link = page.get_by_role("link", name="calibration.safetensors")
    with page.expect_download() as download:
        link.click()
    assert download.value.path().read_bytes() == calibration.read_bytes()
    (tmp_path / "bad.png").write_bytes(b"<svg/>")
    image.locator("input[type=file]").set_input_files(tmp_path / "bad.png")
    expect(page.locator(".said .st-error")).to_contain_text("This is no image")
    image.get_by_label("Clear").click()
    Image.new("RGB", (64, 32), "orange").save(tmp_path / "good.png")
    image.locator("input[type=file]").set_input_files(tmp_path / "good.png")
    expect(page.locator(".said").last).to_contain_text("64 x 32 pixels")


def test_bench(open_page, small_bench):
    page = open_page()
    tab(page, "Bench")
    expect(page.get_by_label("Of", exact=True)).to_have_value("mini")
    page.locator("#start-bench").click()
    chart = page.locator("studio-bench .st-chart")
    expect(chart).to_have_count(4)
    for number, name in enumerate(("local", "random", "ragged", "radial")):
        # A CPU times dense attention with each mask.
        expect(chart.nth(number).locator("h4")).to_contain_text(name)
        expect(chart.nth(number)).to_contain_text("sdpa")
        expect(chart.nth(number)).to_contain_text("gather")
    expect(page.locator("studio-bench table")).to_contain_text("needs CUDA and cuDNN")
    # The page keeps its width, though nothing stands on the left here.
    assert page.evaluate("document.querySelector('#how').offsetWidth") > 1200


# What sticks out of the page and is in nothing that scrolls.
WIDE = """() => [...document.querySelectorAll('body *')].filter((one) => one.checkVisibility()
  && one.getBoundingClientRect().right > innerWidth + 1
  && !one.closest('.st-scroll, pre, .tab-wrapper'))
  .map((one) => `${one.tagName}.${one.className}`)"""


def test_results_on_a_phone(open_page, served, small_bench):
    page = open_page(is_mobile=True, has_touch=True, viewport={"width": 360, "height": 780})
    for kind, form in FORMS.items():
        made(page, served[1], kind, form)
    page = open_page(page.context)
    for title, result in RESULTS.items():
        tab(page, title)
        page.wait_for_selector(f"#how {result}:visible")
        for summary in page.locator(":is(studio-results, studio-inspect) summary:visible").all():
            summary.click()
        assert page.evaluate("innerWidth") == 360 and page.evaluate(WIDE) == [], title
        if title == "Compare":
            for view in ("Wipe", "Difference"):
                page.get_by_role("button", name=view).click()
                assert page.evaluate("innerWidth") == 360 and page.evaluate(WIDE) == [], view


def test_an_older_run_opens_in_a_tab_that_was_never_open(open_page, served):
    page = open_page()
    forms = [{**FORMS["compare"], "prompt": f"a cat {number}"} for number in range(2)]
    for form in forms:
        made(page, served[1], "compare", form)
    page = open_page(page.context)
    page.locator(".st-open").last.click()
    expect(page.locator("studio-stage[kind=compare] h3")).to_have_text("a cat 0")
    # A model that was chosen before is known there too.
    again = open_page(page.context)
    again.locator("#model input").click()
    again.get_by_role("option", name="tiny", exact=True).click()
    again.wait_for_selector("studio-methods[kind=generate][data-model=tiny]")
    tab(again, "Look inside")
    again.wait_for_selector("studio-methods[kind=inspect][data-model=tiny]")
    options = again.locator("studio-methods[kind=inspect] optgroup").first.locator("option")
    expect(options.filter(has_text=re.compile("^radial-wan2.1$"))).to_have_count(1)
    expect(options.filter(has_text="radial-mini")).to_have_count(0)


NAMELESS = r"^\s*- (button|textbox|combobox|slider|spinbutton|checkbox|tab|link|switch)(\s\[|:|$)"


def test_every_control_has_a_name_and_can_be_reached_by_keys(open_page, served):
    page = open_page()
    for kind in ("compare", "inspect"):
        made(page, served[1], kind, FORMS[kind])
    page = open_page(page.context)
    page.get_by_role("button", name="More").click()
    for title, result in RESULTS.items():
        tab(page, title)
        if title in ("Compare", "Look inside"):
            page.wait_for_selector(f"#how {result}:visible")
        for summary in page.locator("#how summary:visible").all():
            summary.click()
        found = page.locator("body").aria_snapshot()
        assert not re.findall(NAMELESS, found, re.MULTILINE), found
    # From the top of the page, Tab goes through every tab's button and the result.
    tab(page, "Look inside")
    # What Bench hides comes back a moment after the click.
    page.wait_for_selector("#prompt textarea")
    page.locator("h1").click()
    seen = set()
    for _ in range(150):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.id || document.activeElement.className"))
        if "st-frames" in seen:
            break
    assert {"start-inspect", "st-icon", "st-chip", "st-frames"} <= seen


def test_escape_in_an_open_list_cancels_nothing(open_page, served):
    page = open_page()
    start_long(page)
    page.wait_for_selector(".st-live")
    page.locator("#dtype input").click()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Cancel")).to_be_enabled()
    (job,) = (job for job in served[1].worker.jobs.values() if job.owner == owner_on(page))
    assert not job.stopped.is_set()
    page.locator("h1").click()
    page.keyboard.press("Escape")
    page.wait_for_selector("text=The run was stopped")


def test_a_server_that_is_gone_is_said(open_page, served):
    page = open_page()
    made(page, served[1], "generate", FORM)
    page = open_page(page.context)
    page.wait_for_selector("studio-stage[kind=generate] studio-player[data-ready=yes]")
    page.context.set_offline(True)
    page.locator(".st-open").click()
    expect(page.locator(".st-note")).to_have_text(
        "The studio does not answer. Is it still running?"
    )
    page.locator("#start-generate").click()
    expect(page.locator(".st-failed")).to_contain_text("does not answer")
    tab(page, "Bench")
    expect(page.locator("studio-bench-form, studio-stage[kind=bench]").last).to_contain_text(
        "The studio does not answer"
    )
    page.context.set_offline(False)
    page.wait_for_function(
        "fetch('/studio/forms').then((answer) => answer.ok, () => false)", polling=200
    )


def test_a_file_that_is_damaged_or_gone_is_said(open_page, served):
    page, desk = open_page(), served[1]
    job = made(page, desk, "generate", FORM)
    look = made(page, desk, "inspect", FORMS["inspect"])
    (desk.store.folder(job.owner, job.name) / "radial.mp4").write_bytes(b"no video")
    for file in desk.store.folder(look.owner, look.name).glob("look-*.bin"):
        file.unlink()
    page = open_page(page.context)
    failed = page.locator("studio-stage[kind=generate] studio-player[data-ready=failed]")
    expect(failed).to_contain_text("This browser cannot play the video")
    tab(page, "Look inside")
    expect(page.locator(".st-numbers")).to_have_text("The maps of this run are not there any more.")
