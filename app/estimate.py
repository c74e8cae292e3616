"""`vdit-sparse estimate`: what a video would cost, without loading any weights."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vdit_sparse.app.checks import BUNDLED, bundled_model
from vdit_sparse.app.estimate_method import Run, Sparsity, sparsity, with_density
from vdit_sparse.app.options import (
    DTYPES,
    InputError,
    RunChoice,
    parse_choice,
    parse_run,
    parse_size,
)
from vdit_sparse.grid import Grid
from vdit_sparse.pipelines.anatomy import Anatomy, anatomy_of, meta_transformer
from vdit_sparse.pipelines.checkpoints import Checkpoint, checkpoint_like, checkpoint_of
from vdit_sparse.pipelines.families import family_of
from vdit_sparse.pipelines.memory import GIB, needed_bytes
from vdit_sparse.pipelines.sources import INDEX, read_json, source_of

# Fields of a generation.json -> those of `Checkpoint`.
GENERATION = {"num_frames": "frames", "num_inference_steps": "steps", "max_sequence_length": "text"}


@dataclass(frozen=True)
class Estimate:
    """What is known of a run before it.

    video: (height, width, frames) in pixels. sparsity: None for dense. flops: of one forward of one
    batch row, attention and rest. memory: bytes by what they are for.
    """

    model: Checkpoint
    anatomy: Anatomy
    video: tuple[int, int, int]
    grid: Grid
    run: Run
    choice: RunChoice
    sparsity: Sparsity | None
    flops: tuple[float, float]
    memory: dict[str, int]

    @property
    def share(self) -> float:
        """Share of self-attention in the FLOPs of a dense forward."""
        return self.flops[0] / sum(self.flops)

    @property
    def bound(self) -> float | None:
        """Speed-up over a dense run by Amdahl's law, if a block costs as much as in dense attention
        and nothing else costs anything; None where the density is not known."""
        if self.sparsity is None or self.sparsity.run is None:
            return None
        return 1 / (1 - self.share * (1 - self.sparsity.run))


def estimate(words: Mapping) -> Estimate:
    """The estimate of a command line. Raises InputError for anything that means nothing, for a size
    that the model does not take (with the nearest that it takes), and for a model or method that
    cannot be had."""
    choice = parse_run(words["method"], words["set_"] or (), words["preset"])
    width = DTYPES[parse_choice("--dtype", words["dtype"], DTYPES)].itemsize
    try:
        model, encoders = subject_of(words["model"], width)
        steps = words["steps"] or model.steps
        video = _video(model, words)
        grid = model.grid(*video)
        transformer = meta_transformer(model)
        anatomy = anatomy_of(transformer, model.joint)
    except (OSError, ValueError) as error:
        raise InputError(str(error)) from error
    run = Run(steps, *((1, 2) if model.guidance == "batch" else (model.branches, 1)))
    choice, found = _method(choice, words["density"], transformer, grid, anatomy, run)
    flops = anatomy.attention(grid), anatomy.rest(grid, model.text)
    weights = anatomy.weights(width)
    memory = {"transformer": weights}
    memory |= {"transformer_2": weights} if model.experts == 2 else {}
    memory |= {"text encoders": encoders}
    memory |= {"activations": anatomy.activations(grid, width, run.rows)}
    memory |= found.memory if found else {}
    return Estimate(model, anatomy, video, grid, run, choice, found, flops, memory)


def subject_of(model: str | None, width: int) -> tuple[Checkpoint, int]:
    """What `--model` names, and the bytes of its text encoders: a published checkpoint in the
    table, or the configurations of a folder or of a model on the Hub. Raises ValueError and OSError
    as `sources` and `checkpoints` do."""
    published = checkpoint_of(model) if model else None
    if published is not None:
        return published, int(published.encoders * 1e9) * width
    source = bundled_model() if model in BUNDLED else source_of(model)
    if isinstance(source, Path) and source.is_file():
        raise ValueError(f"{source} is a file: name the folder or hub id of its pipeline.")
    kind = read_json(source, INDEX).get("transformer", (None, None))[1]
    found = checkpoint_like(kind, read_json(source, "transformer/config.json"), _vae(source))
    said = _json(source, "generation.json")
    known = {field: said[key] for key, field in GENERATION.items() if key in said}
    if "height" in said:
        known["size"] = said["height"], said["width"]
    experts = 2 if _json(source, "transformer_2/config.json") else 1
    return replace(found, name=str(model or "bundled"), experts=experts, **known), _encoders(source)


def _vae(source: Path | str) -> dict:
    return _json(source, "vae/config.json")


def _json(source: Path | str, name: str) -> dict:
    """A JSON file of a model, empty if it does not have it."""
    try:
        return read_json(source, name)
    except FileNotFoundError:
        return {}


def _encoders(source: Path | str) -> int:
    """Bytes of a folder's encoders as they lie there; 0 for a model on the Hub."""
    if not isinstance(source, Path):
        return 0
    return sum(file.stat().st_size for file in source.glob("*_encoder*/*.safetensors"))


def _video(model: Checkpoint, words: Mapping) -> tuple[int, int, int]:
    height, width = parse_size(words["size"]) if words["size"] else model.size
    frames = words["num_frames"] or model.frames
    if words["steps"] is not None and words["steps"] < 1:
        raise InputError(f"--steps must be at least 1, got {words['steps']}.")
    try:
        model.latent(height, width, frames)
    except ValueError as error:
        name = model.name or model.transformer
        raise InputError(f"{name} makes no {height}x{width}x{frames}: {error}") from error
    return height, width, frames


def _method(
    choice: RunChoice, density: float | None, transformer, grid: Grid, anatomy: Anatomy, run: Run
) -> tuple[RunChoice, Sparsity | None]:
    if choice.method is None:
        return choice, None
    if density is not None and not 0 < density <= 1:
        raise InputError(f"--density must be above 0 and at most 1, got {density}.")
    method = with_density(choice.method, density)
    family = family_of(transformer)
    reason = family.refuses(transformer, method) if family.refuses else None
    if reason:
        raise InputError(f"{choice.name} does not run on this model: {reason}.")
    changed = choice if method == choice.method else RunChoice(choice.name, method)
    return changed, sparsity(method, grid, anatomy, run, density)


def as_data(found: Estimate) -> dict:
    """The estimate as plain data: bytes, FLOPs, shares."""
    attention, rest = found.flops
    sparse = found.sparsity
    method = found.choice.method
    return {
        "model": {**asdict(replace(found.model, config={})), "config": dict(found.model.config)},
        "height": found.video[0],
        "width": found.video[1],
        "num_frames": found.video[2],
        "grid": {**asdict(found.grid), "tokens": found.grid.tokens},
        "steps": found.run.steps,
        "method": {"name": found.choice.name, "fields": asdict(method) if method else {}},
        "sparsity": asdict(sparse) if sparse else None,
        "attention_flops": attention,
        "other_flops": rest,
        "attention_share": found.share,
        "bound": found.bound,
        "memory": found.memory,
        "device_bytes": {offload: device_bytes(found, offload) for offload in WAITING},
    }


# How the command tells what waits in RAM.
WAITING = {"none": "all", "model": "--offload model", "group": "--offload group"}
WEIGHTS = ("transformer", "transformer_2", "text encoders")


def device_bytes(found: Estimate, offload: str) -> int:
    """Bytes on the device at once with this offloading."""
    weights = {name: size for name, size in found.memory.items() if name in WEIGHTS}
    away = (*WEIGHTS, "residuals in RAM")
    rest = sum(size for name, size in found.memory.items() if name not in away)
    return needed_bytes(weights, offload) + rest


def show(found: Estimate, console: Console) -> None:
    """Prints an estimate."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, said in _lines(found):
        table.add_row(name, said)
    console.print(table, highlight=False)


def _lines(found: Estimate) -> list[tuple[str, str]]:
    model, anatomy, grid = found.model, found.anatomy, found.grid
    height, width, frames = found.video
    experts = f", {model.experts} experts" if model.experts > 1 else ""
    where = f"{model.hub} ({model.pipeline}), " if model.hub else f"{model.transformer}, "
    text = f" + {grid.text} text" if grid.text else f"; {model.text} text in cross-attention"
    layers = f"{anatomy.layers} layers of {anatomy.heads} x {anatomy.head_dim}"
    return [
        ("model", model.name),
        ("", f"{where}{anatomy.parameters / 1e9:.3g} B parameters{experts}, {layers}"),
        ("video", f"{height}x{width}" + ("" if frames == 1 else f", {frames} frames")),
        ("tokens", f"{grid.frames} x {grid.height} x {grid.width} = {grid.video:,}{text}"),
        *(_method_lines(found) if found.sparsity else [("method", "dense")]),
        *_cost_lines(found),
        *_memory_lines(found),
    ]


def _method_lines(found: Estimate) -> list[tuple[str, str]]:
    sparse = found.sparsity
    density = "unknown" if sparse.density is None else f"{sparse.density:.3f}"
    run = "unknown" if sparse.run is None else f"{sparse.run:.3f}"
    calls = f"{sparse.sparse_calls} of {sparse.calls} calls in {found.run.steps} steps are sparse"
    return [
        ("method", found.choice.label),
        ("blocks", f"{sparse.blocks:,} of {sparse.block} tokens"),
        ("density", f"{density} in a sparse call ({sparse.source})"),
        ("", f"{run} over a run ({calls})"),
    ]


def _cost_lines(found: Estimate) -> list[tuple[str, str]]:
    total = sum(found.flops) * found.model.branches * found.run.steps / 1e15
    share = f"{found.share:.0%} of a dense forward's FLOPs"
    lines = [("attention", f"{share}; a dense run takes {total:.3g} PFLOP")]
    if found.bound is not None:
        most = 1 / (1 - found.share)
        bound = f"at most {found.bound:.2f}x over dense (Amdahl, at equal FLOP/s"
        lines.append(("speed-up", f"{bound}; {most:.2f}x if attention cost nothing)"))
    return lines


def _memory_lines(found: Estimate) -> list[tuple[str, str]]:
    parts = (f"{name} {size / GIB:.3g}" for name, size in found.memory.items() if size)
    device = ", ".join(
        f"{device_bytes(found, offload) / GIB:.3g} ({said})" for offload, said in WAITING.items()
    )
    return [
        ("memory, GiB", ", ".join(parts)),
        ("on the GPU", f"about {device}; the autoencoder not counted"),
    ]
