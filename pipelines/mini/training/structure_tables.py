"""What stage `structure` found as tables and as numbers for a file."""

from itertools import product

import torch
from torch import Tensor

from vdit_sparse.pipelines.mini.training.structure import SHARES, STABLE_SHARE, Structure


def summary(found: Structure) -> str:
    """Two Markdown tables over all layers: the mass in the best blocks, and how stable they are."""
    lines = ["| step | best blocks | mean | least head | median head | greatest head |"]
    lines.append("|---" * 6 + "|")
    for step, (index, share) in product(_steps(found), enumerate(SHARES)):
        heads = torch.cat([each[:, index] for each in _of(found.mass, step)])
        lines.append(f"| {step} | {share:.0%} | {_spread(heads)} |")
    title = f"of the best {STABLE_SHARE:.0%} still there one step later"
    lines += ["", f"| step | {title}, mean | least head | median head | greatest head |"]
    lines.append("|---" * 5 + "|")
    for step in sorted({step for step, _ in found.stability}):
        lines.append(f"| {step} | {_spread(torch.cat(_of(found.stability, step)))} |")
    return "\n".join(lines)


def every_head(found: Structure) -> str:
    """A Markdown table with a row for each layer and head: per step the mass in the best blocks,
    one number for each of `SHARES`, and the stability."""
    steps = _steps(found)
    shares = " / ".join(f"{share:.0%}" for share in SHARES)
    titles = [f"step {step}: {shares}; stable" for step in steps]
    lines = ["| layer | head | " + " | ".join(titles) + " |", "|---" * (2 + len(steps)) + "|"]
    for layer in sorted({layer for _, layer in found.mass}):
        for head in range(len(found.mass[steps[0], layer])):
            cells = [_cell(found, (step, layer), head) for step in steps]
            lines.append(f"| {layer} | {head} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def folded(title: str, table: str) -> str:
    """A table that a reader opens by a click on its title."""
    return f"<details><summary>{title}</summary>\n\n{table}\n\n</details>"


def numbers(found: Structure) -> list[dict]:
    """One dict for each step, layer and head: `mass`, one number for each of `SHARES`, and
    `stability`, None where the run ended with this step."""
    rows = []
    for (step, layer), heads in sorted(found.mass.items()):
        stable = found.stability.get((step, layer))
        for head, mass in enumerate(heads.tolist()):
            stability = None if stable is None else stable[head].item()
            place = {"step": step, "layer": layer, "head": head}
            rows.append({**place, "mass": mass, "stability": stability})
    return rows


def _steps(found: Structure) -> list[int]:
    return sorted({step for step, _ in found.mass})


def _of(found: dict[tuple[int, int], Tensor], step: int) -> list[Tensor]:
    return [each for (at, _), each in sorted(found.items()) if at == step]


def _spread(heads: Tensor) -> str:
    figures = (heads.mean(), heads.min(), heads.median(), heads.max())
    return " | ".join(f"{figure:.2f}" for figure in figures)


def _cell(found: Structure, place: tuple[int, int], head: int) -> str:
    mass = " / ".join(f"{each:.2f}" for each in found.mass[place][head])
    stable = found.stability.get(place)
    return mass if stable is None else f"{mass}; {stable[head]:.2f}"
