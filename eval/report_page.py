"""A report's texts: Markdown, two CSV tables, and one HTML file that needs nothing beside it."""

import csv
import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vdit_sparse.eval.metrics import METRICS
from vdit_sparse.eval.metrics.adherence import on_renders
from vdit_sparse.eval.report import HEADLINE, Findings, Line, Mean, heading, show
from vdit_sparse.eval.report_plot import Point, colour_of, plot
from vdit_sparse.eval.report_style import STYLE
from vdit_sparse.eval.suite import IMAGE

INTERVALS = (
    "± is half of the 95 % confidence interval of the mean over prompts (Student's t); an arrow "
    "points to the better end"
)
SEEN = "How many of the things that the prompts ask for are seen, right of asked"
JUDGED = "by a judge that errs: its own share of right answers is that on held-out renders"


@dataclass(frozen=True)
class Shown:
    """A sample that is shown.

    row: its row; media: a data URI of the dense run, the sample and their difference beside each
    other; "" where there is none, and `why` says so.
    """

    row: Mapping
    media: str
    why: str = ""


def markdown(findings: Findings) -> str:
    """The tables, settings and notes."""
    lines = [f"# {_title(findings)}", "", _facts(findings), ""]
    for columns in filter(None, (findings.main, findings.other)):
        titles = ["#", "method", *(f"{heading(name)}{_arrow(name)}" for name in columns)]
        lines += [*_table(titles, _cells(findings, columns)), ""]
    lines.append(f"{INTERVALS}.")
    rows = _adherence(findings)
    if rows:
        titles = ["#", "method", *rows[0][2:]]
        lines += ["", f"Adherence. {_seen(findings)}:", "", *_table(titles, rows[1:])]
    lines += [f"\nNote: {note}" for note in findings.notes]
    lines += [f"\nFailed: {_failure(row)}" for row in findings.failures]
    protocol = json.dumps(findings.protocol, indent=2, ensure_ascii=False)
    return "\n".join([*lines, "", "## Protocol", "", "```json", protocol, "```", ""])


def methods_csv(findings: Findings) -> str:
    """A row a method: of each column the mean, half the interval, and the number of prompts."""
    parts = ("mean", "ci95", "prompts")
    titles = ["method", "label", *(f"{x}_{part}" for x in findings.columns for part in parts)]
    rows = []
    for line in findings.lines:
        means = [line.means.get(name) for name in findings.columns]
        cells = [x for m in means for x in ((m.value, m.half, m.prompts) if m else ("", "", 0))]
        rows.append([line.name, line.label, *cells])
    return _csv(titles, rows)


def samples_csv(findings: Findings) -> str:
    """A row a sample."""
    own = ("prompt", "seed", "density", "denoise_seconds", "speedup", "peak_memory_bytes", "file")
    metrics = [name for name in findings.columns if name in METRICS]
    rows = [
        [line.label, *(row.get(name) for name in own), *(row["metrics"].get(m) for m in metrics)]
        for line in findings.lines
        for row in line.rows
    ]
    return _csv(["method", *own, *metrics], rows)


def page(findings: Findings, shown: Mapping[str, Sequence[Shown]]) -> str:
    """The HTML file. shown: label of a method -> its worst samples."""
    title = html.escape(_title(findings))
    sections = [
        f"<h1>{title}</h1><p class='facts'>{html.escape(_facts(findings))}</p>",
        *(_html_table(findings, each) for each in (findings.main, findings.other) if each),
        f"<p class='note'>{html.escape(INTERVALS)}.</p>",
        *(f"<p class='note'>{html.escape(note)}</p>" for note in findings.notes),
        _plots(findings),
        _adherence_html(findings),
        _worst(findings, shown),
        _failed(findings),
        _protocol(findings),
    ]
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{title}</title>"
        f"<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<style>{STYLE}</style></head><body><main>{''.join(sections)}</main></body></html>\n"
    )


def _title(findings: Findings) -> str:
    suite, model = findings.protocol["suite"]["name"], findings.protocol["model"]["name"]
    return f"{'The bundled model' if model == 'bundled' else model} on {suite}"


def _facts(findings: Findings) -> str:
    settings, machine = findings.protocol["settings"], findings.protocol["machine"]
    versions = findings.protocol["versions"]
    prompts = len({row["prompt"] for row in findings.lines[0].rows})
    place = machine.get("gpu") or f"{machine['processor']}, threads: {machine['threads']}"
    frames, _, height, width = findings.lines[0].rows[0]["frames"]
    length = "images" if findings.protocol["suite"]["media"] == IMAGE else f"{frames} frames"
    guidance = settings.get("guidance_scale")
    guided = "" if guidance is None else f", guidance {guidance:g}"
    return (
        f"{findings.samples} samples of {prompts} prompts; {height} x {width} pixels, {length}, "
        f"{settings['num_inference_steps']} steps{guided}; "
        f"{findings.protocol['model']['dtype']} on {place}; dense baseline: "
        f"{findings.protocol['baseline']['backend']}; torch {versions['torch']}, diffusers "
        f"{versions['diffusers']}, vdit-sparse {versions['vdit_sparse']}"
    )


def _arrow(name: str) -> str:
    if name not in METRICS:
        return ""
    # A space that does not break.
    return "\N{NO-BREAK SPACE}" + ("↑" if METRICS[name].higher_is_better else "↓")


def _cells(findings: Findings, columns: Sequence[str]) -> list[list[str]]:
    return [
        [str(number), line.label, *(show(line.means.get(name)) for name in columns)]
        for number, line in enumerate(findings.lines, 1)
    ]


def _adherence(findings: Findings) -> list[list[str]]:
    """A first row of titles, one of the judge itself, then one a method; empty where nothing was
    asked."""
    asked = list(dict.fromkeys(name for line in findings.lines for name in line.adherence))
    if not asked:
        return []
    rows = [["#", "method", *asked]]
    if findings.protocol.get("judge"):
        known = on_renders()
        shares = [f"{known[name]:.3f}" if name in known else "–" for name in asked]
        rows.append(["", "the judge, on renders", *shares])
    for number, line in enumerate(findings.lines, 1):
        scores = [line.adherence.get(name, (0, 0)) for name in asked]
        rows.append([str(number), line.label, *(f"{right}/{of}" for right, of in scores)])
    return rows


def _seen(findings: Findings) -> str:
    return f"{SEEN}, {JUDGED}" if findings.protocol.get("judge") else SEEN


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in (titles, *rows)]
    first, *rest = (f"| {' | '.join(row)} |" for row in escaped)
    return [first, "|" + "---|" * len(titles), *rest]


def _csv(titles: Sequence[str], rows: Sequence[Sequence]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([titles, *rows])
    return out.getvalue()


def _series(findings: Findings) -> list[str]:
    return list(dict.fromkeys(line.name for line in findings.lines if line.name != "dense"))


def _html_table(findings: Findings, columns: Sequence[str]) -> str:
    series = _series(findings)
    titles = "".join(f"<th>{html.escape(heading(x))}{_arrow(x)}</th>" for x in columns)
    rows = []
    for number, line in enumerate(findings.lines, 1):
        colour = colour_of(line.name, series) if line.name in series else "#999"
        dot = f"<span class='dot' style='background:{colour}'></span>"
        cells = "".join(_cell(line.means.get(name)) for name in columns)
        name = f"{dot}{html.escape(line.label)}"
        rows.append(f"<tr><td>{number}</td><td class='name'>{name}</td>{cells}</tr>")
    head = f"<thead><tr><th>#</th><th class='name'>method</th>{titles}</tr></thead>"
    return f"<div class='wide'><table>{head}<tbody>{''.join(rows)}</tbody></table></div>"


def _cell(mean: Mean | None) -> str:
    value, *half = show(mean).split(" ± ")
    return f"<td>{value}{f'<small> ± {half[0]}</small>' if half else ''}</td>"


def _plots(findings: Findings) -> str:
    metrics = [name for name in HEADLINE if name in findings.columns]
    dense = next((line for line in findings.lines if line.name == "dense"), None)
    figures = []
    for metric in metrics:
        for x, base in (("density", None), ("denoise_seconds", dense)):
            points = _points(findings, x, metric)
            at = None if base is None else base.means[x].value
            if points:
                drawn = plot(points, heading(x), heading(metric), _series(findings), at)
                figures.append(f"<figure>{drawn}</figure>")
    if not figures:
        return ""
    return (
        "<h2>Quality over density and over seconds</h2><p class='note'>Numbers are those of the "
        f"table; bars are 95 % confidence intervals.</p><div class='plots'>{''.join(figures)}</div>"
    )


def _points(findings: Findings, x: str, y: str) -> list[Point]:
    return [
        Point(number, line.name, line.label, line.means[x], line.means[y])
        for number, line in enumerate(findings.lines, 1)
        if line.name != "dense" and x in line.means and y in line.means
    ]


def _adherence_html(findings: Findings) -> str:
    rows = _adherence(findings)
    if not rows:
        return ""
    head, *body = (
        "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
        for tag, row in (("th", rows[0]), *(("td", row) for row in rows[1:]))
    )
    lines = "".join(f"<tr>{row}</tr>" for row in body)
    return (
        f"<h2>Adherence</h2><p class='note'>{html.escape(_seen(findings))}.</p><div class='wide'>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def _worst(findings: Findings, shown: Mapping[str, Sequence[Shown]]) -> str:
    parts = []
    for number, line in enumerate(findings.lines, 1):
        samples = "".join(_sample(findings, line, each) for each in shown.get(line.label, ()))
        if samples:
            parts.append(f"<h3>{number} {html.escape(line.label)}</h3>{samples}")
    if not parts:
        return ""
    said = "dense, the method, and four times their difference (grey: none), in step"
    return f"<h2>Worst samples</h2><p class='note'>Left to right: {said}.</p>{''.join(parts)}"


def _sample(findings: Findings, line: Line, shown: Shown) -> str:
    values = shown.row["metrics"]
    figures = ", ".join(f"{heading(x)} {values[x]:.4g}" for x in findings.compared if x in values)
    about = html.escape(f"“{shown.row['prompt']}”, seed {shown.row['seed']}: {figures}")
    media = shown.media
    if media.startswith("data:video"):
        tag = f"<video src='{media}' controls muted loop playsinline preload='auto'></video>"
    elif media:
        tag = f"<img src='{media}' alt='dense, method and difference'>"
    else:
        tag = f"<p class='note'>{html.escape(shown.why)}</p>"
    return f"<figure class='sample'>{tag}<figcaption>{about}</figcaption></figure>"


def _failed(findings: Findings) -> str:
    if not findings.failures:
        return ""
    items = "".join(f"<li>{html.escape(_failure(row))}</li>" for row in findings.failures)
    return f"<h2>Failed samples</h2><ul>{items}</ul>"


def _failure(row: Mapping) -> str:
    return f"{row['method']}, “{row['prompt']}”, seed {row['seed']}: {row['error']}"


def _protocol(findings: Findings) -> str:
    text = html.escape(json.dumps(findings.protocol, indent=2, ensure_ascii=False))
    return f"<details><summary>Settings, machine and protocol</summary><pre>{text}</pre></details>"
