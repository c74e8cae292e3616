"""The page's colours: text is readable on all that it stands on (WCAG 2.2, level AA)."""

import re

import pytest

from vdit_sparse.app.demo.routes import STATIC

# Text -> what it stands on.
PAIRS = [
    *(("ink", ground) for ground in ("paper", "card", "field", "soft")),
    *(("faint", ground) for ground in ("paper", "card", "field")),
    *(("accent", ground) for ground in ("paper", "card", "field", "soft")),
    *(("bad", ground) for ground in ("paper", "card")),
    *(("on-accent", ground) for ground in ("accent", "accent-strong")),
    ("paper", "ink"),
]


def colours(scheme: str) -> dict[str, str]:
    """The variables of studio.css without their prefix."""
    start = {"light": ":root", "dark": "body.dark, body.dark"}[scheme]
    text = (STATIC / "studio.css").read_text()
    block = text[text.index(start) :].split("}")[0]
    return dict(re.findall(r"--st-([a-z-]+): (#[0-9a-f]{6})", block))


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return sum(weight * x for weight, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_what_wcag_says():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    # The example of every introduction to the standard: the lightest grey that passes on white.
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("text", "ground"), PAIRS)
def test_text_is_readable(text, ground, scheme):
    found = colours(scheme)
    assert contrast(found[text], found[ground]) >= 4.5


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_has_the_focus_is_seen(scheme):
    found = colours(scheme)
    # Non-text parts need 3 to 1.
    assert min(contrast(found["accent"], found[ground]) for ground in ("paper", "card")) >= 3
