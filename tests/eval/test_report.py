"""Means, intervals and what a report says, refuses and shows."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from tests.eval.run_cases import PROTOCOL
from vdit_sparse.eval.confidence import student_quantile
from vdit_sparse.eval.metrics import METRICS
from vdit_sparse.eval.metrics import adherence as metric
from vdit_sparse.eval.report import (
    Mean,
    heading,
    mean_over_prompts,
    read_findings,
    show,
)
from vdit_sparse.eval.report_page import Shown, markdown, methods_csv, page, samples_csv
from vdit_sparse.eval.report_plot import LEFT, WIDTH, Point, colour_of, plot
from vdit_sparse.eval.store import Store, StoreError, content_hash, digest
from vdit_sparse.pipelines.mini.training.judge import JUDGES, JudgeNetwork, save_judge

FULL = {
    **PROTOCOL,
    "suite": {"name": "toy", "media": "video"},
    "model": {"name": "tiny <b>", "dtype": "float32"},
    "settings": {
        "height": 64,
        "width": 64,
        "num_frames": 5,
        "num_inference_steps": 3,
        "guidance_scale": 5.0,
    },
    "baseline": {"backend": "native"},
    "machine": {"device": "cpu", "processor": "CPU", "threads": 1},
    "versions": {"torch": "2", "diffusers": "0", "vdit_sparse": "1"},
}
PSNR = {("a", 0): 20.0, ("a", 1): 24.0, ("b", 0): 30.0, ("b", 1): 30.0}


def row(label, prompt, seed, protocol=FULL, **changes):
    name, dense = label.split()[0], label == "dense"
    metrics = {} if dense else {"psnr": PSNR[prompt, seed], "ssim": 0.9}
    return {
        "key": content_hash([label, prompt, seed]),
        "protocol": digest(protocol),
        "method": {"name": name, "label": label, "preset": None, "settings": {"of": label}},
        "prompt": prompt,
        "negative_prompt": None,
        "seed": seed,
        "frames": [5, 3, 64, 64],
        "density": 1.0 if dense else 0.25,
        "denoise_seconds": 2.0 if dense else 1.0,
        "speedup": None if dense else 2.0,
        "peak_memory_bytes": 3_000_000_000,
        "frames_sha256": f"{label} {prompt} {seed}",
        **({} if dense else {"reference_sha256": f"dense {prompt} {seed}"}),
        "metrics": {**metrics, "temporal_flickering": 0.98},
        "adherence": {"place": [1, 1], "count": [seed, 2]},
        "commit": "abc",
        "file": f"videos/{name}/{prompt}-{seed}.mp4",
        **changes,
    }


def rows(*labels):
    return [row(label, *sample) for label in labels for sample in PSNR]


def folder(home, content, protocol=FULL, failures=()):
    store = Store(home)
    store.agree(protocol)
    for each in content:
        store.append(each)
    for each in failures:
        store.fail(each)
    store.close()
    return home


@pytest.fixture
def findings(tmp_path):
    lost = {"key": "lost", "method": "radial", "prompt": "b", "seed": 5, "error": "out of memory"}
    content = rows("dense", "radial x<1", "draft")
    return read_findings([folder(tmp_path / "one", content, failures=[lost])])


@pytest.mark.parametrize(
    ("freedom", "value"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (31, 2.03951), (100, 1.98397)],
)
def test_the_quantile_is_that_of_tables(freedom, value):
    assert student_quantile(0.975, freedom) == pytest.approx(value, rel=2e-6)


def test_the_interval_is_over_prompts():
    samples = [(prompt, value) for (prompt, _), value in PSNR.items()]
    mean = mean_over_prompts(samples)
    # Prompts have 22 and 30: their standard deviation is 8 / sqrt(2).
    assert mean.value == 26.0 and mean.prompts == 2
    assert mean.half == pytest.approx(12.7062 * 8 / math.sqrt(2) / math.sqrt(2), rel=1e-5)
    assert mean_over_prompts([("a", 1.0), ("a", 3.0)]) == Mean(2.0, None, 1)


def test_the_interval_holds_the_mean_as_often_as_it_says():
    draws = torch.randn(2000, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    means = [mean_over_prompts(list(zip("abcde", each, strict=True))) for each in draws.tolist()]
    held = sum(abs(mean.value) <= mean.half for mean in means) / len(means)
    assert held == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize(
    ("mean", "text"),
    [
        (Mean(27.3149, 0.4213, 3), "27.31 ± 0.42"),
        (Mean(0.25, 0.0, 3), "0.2500"),
        (Mean(0.25, None, 1), "0.2500"),
        (Mean(1234.5, 130.0, 3), "1234 ± 130"),
        (Mean(0.6866, 0.000026, 3), "0.6866"),
        (Mean(0.0, 0.0, 3), "0.000"),
        (Mean(-1.5, 0.031, 3), "-1.500 ± 0.031"),
        (None, "–"),
    ],
)
def test_digits_are_those_that_the_interval_supports(mean, text):
    assert show(mean) == text


def test_lines_are_means_over_common_samples(tmp_path):
    content = rows("dense", "radial x")[:-1]
    found = read_findings([folder(tmp_path, content)])
    assert found.samples == 3 and found.left_out == 1
    dense, radial = found.lines
    assert (dense.name, radial.label) == ("dense", "radial x")
    assert radial.means["psnr"].value == 26.0 and "psnr" not in dense.means
    assert len(dense.rows) == 3 and radial.means["peak_memory_bytes"].value == 3.0
    assert radial.adherence == {"place": (3, 3), "count": (1, 6)}
    assert "1 samples that not every method has are left out." in found.notes


def test_several_folders_are_one_report(tmp_path):
    homes = [folder(tmp_path / "1", rows("dense", "radial")), folder(tmp_path / "2", rows("draft"))]
    found = read_findings(homes)
    assert [line.label for line in found.lines] == ["dense", "draft", "radial"]
    assert {found.homes[each["key"]] for each in found.lines[1].rows} == {homes[1]}


def test_protocols_do_not_mix(tmp_path):
    other = {**FULL, "machine": {**FULL["machine"], "processor": "GPU"}}
    homes = [folder(tmp_path / "1", rows("dense")), folder(tmp_path / "2", [], other)]
    with pytest.raises(StoreError, match=r"different protocols \(machine.processor: CPU and GPU\)"):
        read_findings(homes)
    stray = folder(tmp_path / "3", [row("dense", "a", 0, other)])
    with pytest.raises(StoreError, match="has rows of another protocol"):
        read_findings([stray])


def test_nothing_to_compare_is_one_line(tmp_path):
    with pytest.raises(StoreError, match="no finished sample yet"):
        read_findings([folder(tmp_path / "1", [])])
    apart = [row("dense", "a", 0), row("draft", "a", 1)]
    with pytest.raises(StoreError, match="no sample that all methods have"):
        read_findings([folder(tmp_path / "2", apart)])


def test_notes_tell_what_a_reader_must_know(tmp_path):
    content = rows("dense", "draft")
    content[-1]["reference_sha256"] = "other"
    content[-2]["unmeasured"] = {"ssim": "too small."}
    content[0]["commit"] = "def"
    notes = " ".join(read_findings([folder(tmp_path, content)]).notes)
    assert "dense run of 1 samples was repeated" in notes and "abc, def" in notes
    assert "SSIM: too small. (1 samples have no value)" in notes


def test_texts_hold_the_numbers(findings):
    text = markdown(findings)
    assert text.startswith("# tiny <b> on toy\n")
    assert "| 3 | radial x<1 | 0.2500 | 1.000 | 2.000 | 3.000 | 26 ± 51 | 0.9000 |" in text
    assert "radial, “b”, seed 5: out of memory" in text and "| 3 | radial x<1 | 4/4 | 2/8 |" in text
    protocol = re.search(r"```json\n(.*)```", text, re.S)[1]
    assert json.loads(protocol) == FULL
    head, dense, *_ = methods_csv(findings).splitlines()
    assert head.startswith("method,label,density_mean,density_ci95,density_prompts,")
    assert dense.startswith("dense,dense,1.0,0.0,2,2.0,0.0,2,,,0,")
    assert len(samples_csv(findings).splitlines()) == 13


def test_beside_adherence_stands_how_often_the_judge_is_right(tmp_path, monkeypatch):
    facts = {"held_out": {"renders": {"statements": 0.91, "place": 0.9876}}}
    save_judge(JudgeNetwork(JUDGES["tiny"]), tmp_path / "judge", facts)
    monkeypatch.setattr(metric, "SHIPPED", tmp_path / "judge")
    monkeypatch.setitem(METRICS, "adherence", replace(METRICS["adherence"], title=metric.title()))
    content = rows("dense", "draft")
    for each in content:
        each["metrics"]["adherence"] = 0.75
    judged = {**FULL, "judge": True}
    for each in content:
        each["protocol"] = digest(judged)
    found = read_findings([folder(tmp_path / "judged", content, judged)])
    text, html = markdown(found), page(found, {})
    # In the table of metrics by the column's title, in that of rows by a line of its own.
    arrow = "\N{NO-BREAK SPACE}↑"
    assert f"| adherence (judge; on renders 0.910){arrow} |" in text
    assert f"<th>adherence (judge; on renders 0.910){arrow}</th>" in html
    assert "|  | the judge, on renders | 0.988 | – |" in text and "by a judge that errs" in text
    assert "<td>the judge, on renders</td><td>0.988</td><td>–</td>" in html
    # What is counted without a judge has no such line.
    plain = read_findings([folder(tmp_path / "plain", rows("dense", "draft"))])
    for said in (markdown(plain), page(plain, {})):
        assert "right of asked" in said and "the judge" not in said and "errs" not in said


class _Balance(HTMLParser):
    """Counts opened and closed tags, and collects the addresses of whatever is loaded."""

    def __init__(self):
        super().__init__()
        self.open, self.sources = [], []

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_alone(findings):
    worst = findings.lines[2].rows[0]
    shown = {
        "radial x<1": [Shown(worst, "data:video/mp4;base64,AAAA"), Shown(worst, "", "it is lost")]
    }
    text = page(findings, shown)
    parser = _Balance()
    parser.feed(text)
    assert parser.open == [] and parser.sources == ["data:video/mp4;base64,AAAA"]
    assert "tiny &lt;b&gt; on toy" in text and "radial x&lt;1" in text and "<b>" not in text
    # PSNR and SSIM, over density and over seconds.
    assert text.count("<svg") == 4 and "it is lost" in text and "out of memory" in text
    assert f"<th>{heading('psnr')}\N{NO-BREAK SPACE}↑</th>" in text


def test_a_plot_shows_points_where_they_are():
    points = [
        Point(2, "radial", "radial a", Mean(0.2, 0.0, 3), Mean(20.0, 1.0, 3)),
        Point(3, "radial", "radial b", Mean(0.5, 0.0, 3), Mean(30.0, None, 1)),
        Point(4, "draft", "draft", Mean(0.5, 0.0, 3), Mean(25.0, 2.0, 3)),
    ]
    svg = plot(points, "density", "PSNR", ["draft", "radial"], dense=1.0)
    circles = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="5" fill="(#\w+)"', svg)
    (x2, y2, _), (x3, y3, colour), (x4, y4, other) = ([*map(float, c[:2]), c[2]] for c in circles)
    assert x2 < x3 == x4 and y3 < y4 < y2 and colour != other
    assert other == colour_of("draft", ["draft", "radial"])
    assert all(LEFT <= x <= WIDTH for x in (x2, x3))
    # Equal steps in value are equal steps in pixels.
    assert (y2 - y4) == pytest.approx(y4 - y3, abs=0.2)
    assert svg.count("<polyline") == 1 and ">dense</text>" in svg


def test_a_plot_of_a_single_value_has_axes():
    point = Point(2, "draft", "draft", Mean(0.0, None, 1), Mean(100.0, None, 1))
    svg = plot([point], "density", "PSNR", ["draft"])
    assert len(set(re.findall(r'<text class="small"[^>]*>([^<]*)', svg))) >= 6
