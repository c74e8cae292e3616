"""Rows of results as a table, a CSV file and a roofline."""

import csv
import subprocess
from pathlib import Path

import torch
import triton

# Name of a GPU -> dense bf16 and 8-bit TFLOP/s and TB/s of its data sheet.
PEAKS = {
    "H200": (989, 1979, 4.8),
    "H100": (989, 1979, 3.35),
    "A100": (312, 624, 2.0),
}


def machine(device: torch.device) -> dict[str, str]:
    """What a number needs beside it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    if device.type == "cpu":
        name = f"cpu, {torch.get_num_threads()} threads"
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    return {
        "machine": name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit,
    }


def table(rows: list[dict]) -> list[str]:
    """Lines: mask, density, time, rate, error and kernel, or why there is none."""
    return [line(each) for each in rows]


def line(row: dict) -> str:
    """One row as text."""
    start = f"{row['pattern']:12} {row['density']:6.3f}"
    if row["ms"] is None:
        return f"{start} {'-':>9}    {'-':>7}          {row['kernel']}: {row['note']}"
    error = "" if row.get("error") is None else f" {row['error']:.0e}"
    return f"{start} {row['ms']:9.3f} ms {row['tflops']:7.1f} TFLOP/s{error}  {row['kernel']}"


def report(rows: list[dict], facts: dict[str, str]) -> None:
    """Prints the rows as a table."""
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    first = rows[0]
    print({name: first[name] for name in ("heads", "tokens", "dim", "block", "dtype")})
    print("\n".join(table(rows)), flush=True)


def append(path: Path, rows: list[dict], facts: dict) -> None:
    """Appends rows, each with the facts of the machine, to a CSV file; a new one gets a header."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0] | facts))
        if new:
            writer.writeheader()
        writer.writerows(each | facts for each in rows)


def roofline(rows: list[dict], gpu: str, path: Path) -> None:
    """A PNG: TFLOP/s on kept blocks over FLOP for each byte that has to be moved (q, k, v and the
    output once), below the peaks of the data sheet where `gpu` is in `PEAKS`. Raises
    ModuleNotFoundError without matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    timed = [row for row in rows if row["ms"] is not None]
    for name in dict.fromkeys(row["kernel"] for row in timed):
        points = [(intensity(row), row["tflops"]) for row in timed if row["kernel"] == name]
        axes.plot(*zip(*points, strict=True), "o", label=name, markersize=5)
    known = next((peaks for part, peaks in PEAKS.items() if part in gpu), None)
    if known is not None and timed:
        low, high = min(map(intensity, timed)) / 2, max(map(intensity, timed)) * 2
        # The slope is a curve on this axis, which takes points.
        places = [low * (high / low) ** (i / 100) for i in range(101)]
        for peak, name in zip(known, ("bf16", "8 bits"), strict=False):
            roof = [min(peak, known[2] * place) for place in places]
            axes.plot(places, roof, "--", linewidth=1, label=f"peak, {name}")
    axes.set(xscale="log", xlabel="FLOP / byte", ylabel="TFLOP/s on kept blocks", title=gpu)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=120)


def intensity(row: dict) -> float:
    """FLOP for each byte of q, k, v and the output."""
    itemsize = torch.tensor([], dtype=getattr(torch, row["dtype"])).element_size()
    # 4 D S^2 density FLOP a head, over 4 S D numbers.
    return row["tokens"] * row["density"] / itemsize
