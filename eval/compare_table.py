"""The rows of `eval.compare` as Markdown tables."""

import re
from statistics import mean

CONTROLS = ("RandomBlocks", "OracleBlocks")
TITLES = (
    "method",
    "density of a sparse step",
    "mean after the dense steps",
    "of the run",
    "PSNR dB",
    "random",
    "oracle",
    "SSIM",
    "output error",
    "planning",
    "s a clip",
)


def tables(rows: list[dict]) -> str:
    """One table for each number of frames: a line for each setting of a method, with the PSNR of
    the two controls at its density beside it."""
    parts = []
    for frames in sorted({row["frames"] for row in rows}):
        group = [row for row in rows if row["frames"] == frames]
        lines = [f"| {' | '.join(TITLES)} |", "|" + "---|" * len(TITLES)]
        lines += [_dense(row) for row in group if row["name"].startswith("dense")]
        ordered = sorted(
            (row for row in group if row.get("error") is not None and row["name"] not in CONTROLS),
            key=lambda row: (row["name"], -row["sparse_density"]),
        )
        lines += [_line(row, group) for row in ordered]
        parts.append(f"### {frames} frames\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def control_psnr(row: dict, group: list[dict], name: str, once: bool = False) -> float | None:
    """Mean PSNR of a control at the density of a row, or of the one that never changes its blocks
    (`once`); None if it was not run."""
    wanted = f"density={round(row['sparse_density'], 2)},"
    found = [
        other
        for other in group
        if other["name"] == name
        and wanted in f"{other['method'][:-1]},"
        and ("refresh='once'" in other["method"]) == once
    ]
    return mean(found[0]["psnr"]) if found else None


def _line(row: dict, group: list[dict]) -> str:
    random, oracle = (control_psnr(row, group, name) for name in CONTROLS)
    fixed = control_psnr(row, group, CONTROLS[0], once=True)
    cells = (
        _label(row),
        f"{row['step_density']:.3f}",
        f"{row['sparse_density']:.3f}",
        f"{row['density']:.3f}",
        f"**{mean(row['psnr']):.2f}**",
        _number(random) + ("" if fixed is None else f" (fixed: {fixed:.2f})"),
        _number(oracle),
        f"{mean(row['ssim']):.3f}",
        f"{row['error']:.3f}",
        "" if row["planning_share"] is None else f"{row['planning_share']:.1%}",
        f"{row['seconds']:.3f}",
    )
    return f"| {' | '.join(cells)} |"


def _label(row: dict) -> str:
    """The method's name, and what sets its rows apart beside the density."""
    found = re.findall(r"(?:precision|refresh|d1|decay|sink_frames)=[^,)]+", row["method"])
    usual = ("refresh='each'", "precision='bf16'", "sink_frames=1", "decay=0.2", "d1='full'")
    if row["name"] not in ("radial", "rettention"):
        found = [x for x in found if x.startswith("precision")]
    return " ".join([row["name"], *(x.replace("'", "") for x in found if x not in usual)])


def _dense(row: dict) -> str:
    psnr = _number(mean(row["psnr"]) if "psnr" in row else None)
    ssim = f"{mean(row['ssim']):.3f}" if "ssim" in row else ""
    cells = (row["name"], "1", "1", "1", psnr, "", "", ssim, "", "", f"{row['seconds']:.3f}")
    return f"| {' | '.join(cells)} |"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
