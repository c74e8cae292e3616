"""What the browser tests do on a page."""


def choose_tiny(page, kind: str, methods: list[str]) -> None:
    """Picks the tiny model, and methods with blocks of 64, in a tab."""
    page.locator("#model input").click()
    page.get_by_role("option", name="tiny", exact=True).click()
    page.wait_for_function("document.querySelector('#size input').value === '32x64'")
    page.wait_for_selector(f"studio-methods[kind={kind}][data-model=tiny]")
    for number, name in enumerate(methods):
        form = page.locator(f"studio-methods[kind={kind}] studio-method").nth(number)
        form.locator("select").first.select_option(name)
        form.locator("summary").first.click()
        form.get_by_label("block", exact=True).select_option("64")


def start_long(page) -> None:
    """Starts a run in the tab Generate that is still running whatever a test does meanwhile."""
    choose_tiny(page, "generate", ["radial"])
    page.locator("#size input").fill("256x512")
    for name, count in (("steps", 100), ("frames", 81)):
        page.locator(f"#{name} input[type=number]").fill(str(count))
        page.keyboard.press("Tab")
    page.locator("#start-generate").click()


def tab(page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def pixels(page, selector: str) -> list[int]:
    """The colours of a canvas, as the browser shows them."""
    read = "c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"
    return page.locator(selector).first.evaluate(read)
