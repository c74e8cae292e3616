"""All methods at four densities on 32 prompts, with the tuner's line: writes docs/leaderboard.md.

    python -m vdit_sparse.eval.leaderboard --out DIR --tuned DIR/tuned-*.safetensors

The rows are those of `eval.compare`, on twice the prompts and without controls, and are kept in
DIR/rows.jsonl: a run that is there is not repeated, so a command that was cut off goes on. Tuned
files are made before, by `vdit-sparse tune --density` at the densities that `--densities` prints.
"""

import argparse
import logging
import re
import sys
from pathlib import Path

import torch

from vdit_sparse.calibration import load
from vdit_sparse.eval.compare import DENSE_STEPS, DENSITIES, Comparison, Trial, trials
from vdit_sparse.eval.confidence import interval
from vdit_sparse.eval.tune_bar import HELD_OUT, prompts_of
from vdit_sparse.kernels.bench import machine
from vdit_sparse.pipelines.load import load_pipeline
from vdit_sparse.tuned import TunedAttention

PAGE = Path(__file__).parent.parent / "docs" / "leaderboard.md"
# The fields that the rows of a method differ in, where it is not its density alone.
_SHOWN = {
    "radial": ("decay", "d1", "sink_frames"),
    "rettention": ("density", "refresh"),
    "adaspa": ("density", "refresh"),
}
_FIELD = re.compile(r"(\w+)=('[^']*'|\([^)]*\)|[^,)]+)")
TITLES = ("method", "density of the run", "PSNR dB", "SSIM", "setting")
HEAD = """# Leaderboard

The bundled model, {frames} frames of {height} x {width}, {steps} steps, guidance
{guidance_scale:g}, {prompts} prompts of the grammar (`eval/prompts/mini.txt`, `mini_more.txt`),
seeds 0 to {last}, each run from the noise of its prompt's seed against dense attention of the same
batch. {machine}. Made by

    {command}

The single methods have blocks of 64 and the first 4 steps dense; aimed at are densities of 0.5,
0.35, 0.25 and 0.15 of a sparse step. *tuned* is `vdit-sparse tune --density` at the density of
the run that these have, searched on other prompts ([tune](tune.md)). ±: 95 % confidence of the
mean over prompts. Rows are sorted by the density of the run, searches and cache steps counted at
1; compare rows of about the same density. There are no times: at this size nothing is faster than
dense attention on a GPU; at the sizes of large models see [performance](performance.md).
"""


def run_densities(steps: int) -> list[float]:
    """What runs have whose first steps are dense and whose others have one of `DENSITIES`."""
    left = steps - DENSE_STEPS
    return [round((DENSE_STEPS + left * density) / steps, 4) for density in DENSITIES]


def table(rows: list[dict]) -> str:
    """The rows as Markdown, sparsest last."""
    lines = [f"| {' | '.join(TITLES)} |", "|" + "---|" * len(TITLES)]
    for row in sorted((row for row in rows if "density" in row), key=lambda row: -row["density"]):
        psnr, half = interval(row["psnr"])
        cells = (
            f"**{row['name']}**" if row["name"] == "tuned" else row["name"],
            f"{row['density']:.3f}",
            f"{psnr:.2f} ± {half:.2f}",
            f"{sum(row['ssim']) / len(row['ssim']):.3f}",
            _setting(row),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _setting(row: dict) -> str:
    """What sets a row apart from the others of its method."""
    found = dict(_FIELD.findall(row["method"]))
    if row["name"] == "tuned":
        return ""
    if found.get("calibration", "None") != "None":
        words = [f"calibrated for {row['target']:g}"]
    else:
        words = [f"`{name}={found[name]}`" for name in _SHOWN.get(row["name"], ("density",))]
    if found["precision"] != "'bf16'":
        words.append(f"`precision={found['precision']}`")
    return ", ".join(words)


def board(arguments: argparse.Namespace) -> str:
    """Runs whatever is not in the folder's rows yet, and returns the page."""
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    prompts = prompts_of(HELD_OUT)[: arguments.prompts]
    settings = {name: value for name, value in pipe.generation.items() if name != "fps"}
    inputs = {**settings, "prompt": prompts, "seed": list(range(len(prompts)))}
    comparison = Comparison(pipe, inputs, arguments.out / "rows.jsonl")
    for file in arguments.tuned:
        target = load(file).fields.get("density")
        comparison.add(Trial("tuned", TunedAttention(calibration=str(file)), target))
        logging.info("tuned %s", file)
    for trial in trials(pipe, inputs, arguments.out, DENSITIES):
        row = comparison.add(trial)
        logging.info("%s density %.3f", trial.name, row["density"])
    facts = machine(pipe.device)
    head = HEAD.format(
        **{name: settings[name] for name in ("height", "width", "guidance_scale")},
        frames=settings["num_frames"],
        steps=settings["num_inference_steps"],
        prompts=len(prompts),
        last=len(prompts) - 1,
        machine=f"{facts.pop('machine')}, {', '.join(map(' '.join, facts.items()))}",
        command=" ".join(["python -m vdit_sparse.eval.leaderboard", *sys.argv[1:]]),
    )
    return f"{head}\n{table(comparison.known.rows)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a folder for the rows and calibrations")
    parser.add_argument("--tuned", type=Path, nargs="*", default=[])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--densities", type=int, metavar="STEPS", help="says what to tune for")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if arguments.densities:
        logging.info(" ".join(map(str, run_densities(arguments.densities))))
        return
    if arguments.out is None:
        parser.error("--out is needed")
    arguments.out.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        arguments.page.write_text(board(arguments))


if __name__ == "__main__":
    main()
