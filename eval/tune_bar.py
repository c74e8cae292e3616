"""A tuned file against the best uniform setting of a single method, on prompts new to both.

    python -m vdit_sparse.eval.tune_bar --calibration FILE --density 0.25 --out DIR

writes DIR/bar.json and DIR/bar.md. The uniform settings (`eval.uniform`) are compared by the error
of their latents on the tuning prompts, and the best of all runs on the held-out prompts beside the
tuned file, from the same noise. What was measured is kept in DIR/rows.jsonl: a command that was cut
off goes on.
"""

import argparse
import json
import logging
import time
from functools import cache
from pathlib import Path
from statistics import mean

import torch

from vdit_sparse.calibration import load
from vdit_sparse.eval.compare import PROMPTS
from vdit_sparse.eval.confidence import interval
from vdit_sparse.eval.known_rows import KnownRows
from vdit_sparse.eval.tune_samples import Samples, error_db
from vdit_sparse.eval.uniform import calibrations, uniform
from vdit_sparse.method import SparseAttention
from vdit_sparse.pipelines.load import load_pipeline
from vdit_sparse.tuned import TunedAttention

TUNING, HELD_OUT = ("mini_tuning.txt",), ("mini.txt", "mini_more.txt")
TUNING_SEED, CALIBRATED = 1000, 4


def prompts_of(names: tuple[str, ...]) -> list[str]:
    """The lines of prompt files of this folder."""
    lines = [line for name in names for line in (PROMPTS / name).read_text().splitlines()]
    return [line for line in lines if line]


def best_uniform(
    pipe, settings: dict, arguments: argparse.Namespace, grid, known: KnownRows
) -> list[tuple[dict, SparseAttention]]:
    """All uniform settings with the error of their latents on the tuning prompts, best first."""
    prompts = prompts_of(TUNING)
    samples = Samples(pipe, prompts, [TUNING_SEED] * len(prompts), settings, arguments.batch)
    dense, steps = cache(lambda: samples.latents(None)), settings["num_inference_steps"]
    few = prompts[:CALIBRATED], [TUNING_SEED]
    files = {}
    if not arguments.no_calibrations:
        files = calibrations(pipe, arguments.density, steps, *few, arguments.out, **settings)
    found = []
    for name, method in uniform(arguments.density, grid, steps, files):
        asked = {"prompts": "tuning", "name": name, "method": repr(method)}
        row = known.find(**asked)
        if row is None:
            expected = dense()
            error = error_db(samples.latents(method), expected)
            row = known.keep({**asked, "density": samples.density(), "error": error})
        logging.info("%-11s density %.3f error %6.2f dB", name, row["density"], row["error"])
        found.append((row, method))
    return sorted(found, key=lambda pair: pair[0]["error"])


def held_out(
    pipe, settings: dict, arguments: argparse.Namespace, chosen: dict, known: KnownRows
) -> dict[str, dict]:
    """Density and PSNR of the chosen methods on each of the held-out prompts, by name."""
    prompts = prompts_of(HELD_OUT)[: arguments.prompts]
    samples = Samples(pipe, prompts, list(range(len(prompts))), settings, arguments.batch)
    dense = cache(lambda: samples.frames(None))
    found = {}
    for name, method in chosen.items():
        asked = {"prompts": len(prompts), "name": name, "method": repr(method)}
        row = known.find(**asked)
        if row is None:
            expected = dense()
            psnr = samples.psnr(method, expected)
            row = known.keep({**asked, "density": samples.density(), "psnr": psnr})
        found[name] = {part: row[part] for part in ("method", "density", "psnr")}
        logging.info("%-11s %.2f dB at %.3f", name, mean(row["psnr"]), row["density"])
    return found


def measure(arguments: argparse.Namespace) -> dict:
    """Chooses, runs the held-out prompts, and returns all figures."""
    started = time.perf_counter()
    known = KnownRows(arguments.out / "rows.jsonl")
    pipe = load_pipeline(arguments.model)
    pipe.set_progress_bar_config(disable=True)
    settings = {name: value for name, value in pipe.generation.items() if name != "fps"}
    made = load(arguments.calibration)
    settings["num_inference_steps"] = made.steps
    uniforms = best_uniform(pipe, settings, arguments, made.grid, known)
    chosen = {"tuned": TunedAttention(calibration=str(arguments.calibration))}
    for row, method in uniforms:  # the best of each of the two best methods
        if len(chosen) < 3:
            chosen.setdefault(row["name"], method)
    runs = held_out(pipe, settings, arguments, chosen, known)
    best = max((mean(run["psnr"]), name) for name, run in runs.items() if name != "tuned")[1]
    pairs = zip(runs["tuned"]["psnr"], runs[best]["psnr"], strict=True)
    gain, half = interval([ours - theirs for ours, theirs in pairs])
    about = {"best": best, "gain": gain, "half": half, "prompts": len(runs["tuned"]["psnr"])}
    rows = [row for row, _ in uniforms]
    return {**about, "runs": runs, "uniform": rows, "seconds": time.perf_counter() - started}


def table(bar: dict) -> str:
    """The figures as Markdown."""
    lines = ["| run | density | PSNR dB | setting |", "|---|---|---|---|"]
    for name, row in bar["runs"].items():
        psnr, half = interval(row["psnr"])
        lines.append(
            f"| {name} | {row['density']:.3f} | {psnr:.2f} ± {half:.2f} | `{row['method']}` |"
        )
    lines.append(
        f"\nTuned minus {bar['best']}: {bar['gain']:.2f} ± {bar['half']:.2f} dB (mean of paired "
        f"differences over {bar['prompts']} prompts, 95 % confidence)."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--no-calibrations", action="store_true", help="leaves offline methods out")
    parser.add_argument("--model")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments.out.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        bar = measure(arguments)
    (arguments.out / "bar.json").write_text(json.dumps(bar, indent=1) + "\n")
    (arguments.out / "bar.md").write_text(table(bar) + "\n")
    logging.info(table(bar))


if __name__ == "__main__":
    main()
