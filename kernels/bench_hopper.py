"""Which forms of the Hopper kernel help? A study, while `kernels/LOG.md` has open questions.

    python -m vdit_sparse.kernels.bench_hopper [--only GROUP ...] [--check] [--csv FILE]

First every form computes a small problem, in processes of its own, so that one that hangs or fails
is a line in the table; then those that were right are timed. Under 100 s in all on one H200 and 16
cores. TFLOP/s count the kept blocks only.
"""

import argparse
import csv
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass, fields, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from vdit_sparse.kernels.block_mask import BlockMask
from vdit_sparse.kernels.block_sparse.hopper.variants import Variant, variant_for
from vdit_sparse.kernels.block_sparse.layout import empty_outputs
from vdit_sparse.kernels.block_sparse.reference import forward as reference_forward

WIDE = {"heads": 24, "tokens": 32768, "dim": 128}
NARROW = {"heads": 16, "tokens": 45056, "dim": 64}
EVEN = [("local", 0.25), ("random", 0.25), ("local", 0.1), ("random", 0.1)]
LARGEST_ERROR = {"bf16": 7e-3, "int8_bf16": 1.6e-2, "int8_fp8": 4.5e-2}
SECONDS = 50  # after which small problems that are not done count as hung


@dataclass(frozen=True)
class Form:
    """One line of the table: a kernel for blocks of these sizes, and what differs from the default
    form."""

    group: str
    name: str
    dim: int
    blocks: tuple[int, int] = (128, 128)
    precision: str = "bf16"
    changes: tuple[tuple[str, int], ...] = ()

    @property
    def variant(self) -> Variant:
        chosen = variant_for(self.dim, self.blocks, self.precision)
        return replace(chosen, **dict(self.changes))


def forms(groups: list[str]) -> list[Form]:
    """Every form of the groups asked for."""
    flags = ["persistent", "pingpong", "lazy", "unroll", "longest_first"]
    wide: list[dict] = [{}, *({flag: True} for flag in flags)]
    wide += [
        {"persistent": True, "pingpong": True},
        {"keys": 64, "stages": 4},
        {"keys": 64, "stages": 4, "merged": True},
        {"stages": 3},
    ]
    narrow: list[dict] = [{}, {"emulate": True}, {"pingpong": True}, {"persistent": True}]
    narrow += [{"emulate": True, "pingpong": True}, {"emulate": True, "persistent": True}]
    narrow += [{"stages": 2}, {"lazy": True}]
    eight: list[dict] = [{}, {"pingpong": True}, {"persistent": True}, {"stages": 4}]
    eight += [{"late": True}, {"late": True, "keys": 64, "stages": 4}]
    found = [_form("wide", 128, changes=change) for change in wide]
    found += [_form("narrow", 64, changes=change) for change in narrow]
    for blocks in ((64, 128), (64, 64), (128, 64)):
        found += [_form("rows", 128, blocks)]
    found += [_form("rows", 128, (64, 128), changes={"keys": 128, "stages": 1})]
    found += [_form("rows", 128, (64, 128), changes={"persistent": True, "stages": 2})]
    found += [_form("rows", 128, (64, 128), changes={"lazy": True})]
    found += [_form("eight", 128, precision="int8_fp8", changes=change) for change in eight]
    found += [_form("eight", 128, precision="int8_bf16", changes=change) for change in eight[:2]]
    found += [_form("eight", 64, precision="int8_fp8", changes=change) for change in eight[:2]]
    return [form for form in found if form.group in groups]


def _form(group: str, dim: int, blocks=(128, 128), precision="bf16", changes=None) -> Form:
    items = tuple((changes or {}).items())
    words = [name if value is True else f"{name} {value}" for name, value in items]
    return Form(group, ", ".join(words) or "as it is", dim, blocks, precision, items)


def make_mask(heads: int, tokens: int, blocks: tuple[int, int], pattern: str, share: float):
    """A list per head: the nearest blocks in space and time ("local"), any ("random"), or any with
    rows of 16 to 1 in length ("ragged")."""
    nq, nk = (-(-tokens // block) for block in blocks)
    scores = torch.rand(heads, nq, nk, device="cuda")
    lengths = torch.full((heads, nq, 1), share * nk, device="cuda")
    if pattern == "local":
        (row, column), frames = (torch.arange(n, device="cuda") / n for n in (nq, nk)), 16
        frame = (row[:, None] * frames).floor() - (column * frames).floor()
        place = row[:, None] * frames % 1 - column * frames % 1
        scores -= (place * nk / frames).abs() + 2 * frame.abs()
    if pattern == "ragged":
        lengths = 16 ** torch.rand(heads, nq, 1, device="cuda")
        lengths *= share * nk / lengths.mean()
    rank = scores.argsort(-1, descending=True).argsort(-1)
    return BlockMask.from_keep(rank < lengths.round().clamp(1, nk), blocks)


def make_tensors(heads: int, tokens: int, dim: int) -> list[Tensor]:
    """q, k and v as a transformer gives them."""
    shape = (1, tokens, heads, dim)
    return [torch.randn(shape, dtype=torch.bfloat16, device="cuda").transpose(1, 2) for _ in "qkv"]


def error_of(form: Form) -> str | None:
    """Computes a small problem: None if it is right, else what is wrong. Compiles on the way."""
    from vdit_sparse.kernels.block_sparse.hopper.launch import launch

    torch.manual_seed(0)
    q, k, v = make_tensors(48, 1000, form.dim)
    mask = make_mask(48, 1000, form.blocks, "ragged", 0.4)
    scale = form.dim**-0.5
    try:
        out, lse = launch(q, k, v, mask, scale, None, form.precision, form.variant)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:90]}"
    expected, expected_lse = reference_forward(*(x.float() for x in (q, k, v)), mask, scale)
    error = float((out.float() - expected).norm() / expected.norm())
    lse_error = float((lse - expected_lse).abs().max())
    right = error <= LARGEST_ERROR[form.precision] and lse_error <= 0.05
    return None if right else f"wrong by {error:.1e}, lse by {lse_error:.1e}"


def faults(every: list[Form], workers: int) -> dict[Form, str | None]:
    """`error_of` each form, several at a time; "hung" for those that do not come back."""
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    futures = {form: pool.submit(error_of, form) for form in every}
    wait(futures.values(), timeout=SECONDS)
    found = {}
    for form, future in futures.items():
        if not future.done():
            found[form] = "hung"
        elif future.exception() is not None:
            found[form] = f"its process died: {future.exception()}"
        else:
            found[form] = future.result()
    if "hung" in found.values():
        for process in list(pool._processes.values()):
            process.kill()
    pool.shutdown(wait=False, cancel_futures=True)
    return found


def milliseconds(call: Callable[[], object], rounds: int = 9) -> float:
    """Median of `rounds` calls, after three."""
    for _ in range(3):
        call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in "ab"] for _ in range(rounds)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def time_form(form: Form, tensors: list[Tensor], mask: BlockMask) -> dict[str, float]:
    """Milliseconds of the kernel and, in 8 bits, of it with quantising."""
    from vdit_sparse.kernels.block_sparse.hopper.launch import attend, quantized

    q, k, v = tensors
    out, lse = empty_outputs(q)
    inputs = quantized(q, k, v, mask, None, form.precision)
    scale = form.dim**-0.5
    kernel = partial(attend, inputs, out, lse, mask, scale, None, form.variant, k.shape[2])
    found = {"ms": milliseconds(kernel)}
    if form.precision != "bf16":
        found["quantise_ms"] = milliseconds(lambda: quantized(q, k, v, mask, None, form.precision))
    return found


def masks_of(form: Form) -> list[tuple[str, float]]:
    """What this form is timed on."""
    if form.group == "wide":
        return [*EVEN, ("ragged", 0.25), ("all", 1.0)]
    return [("local", 0.25), ("random", 0.25), ("ragged", 0.25)][: 3 if form.group == "rows" else 2]


def rows_of(every: list[Form], wrong: dict[Form, str | None]) -> Iterator[dict]:
    """Results as they come; dense attention of cuDNN before each head size."""
    made: dict[tuple, BlockMask] = {}
    tensors: dict[int, list[Tensor]] = {}
    for form in every:
        shape = WIDE if form.dim == 128 else NARROW
        if form.dim not in tensors:
            tensors[form.dim] = make_tensors(**shape)
            yield cudnn(tensors[form.dim], shape)
        facts = {f.name: getattr(form, f.name) for f in fields(form) if f.name != "changes"}
        if wrong[form] is not None:
            yield facts | {"note": wrong[form]}
            continue
        for pattern, share in masks_of(form):
            key = (form.dim, form.blocks, pattern, share)
            if key not in made:
                made[key] = make_mask(shape["heads"], shape["tokens"], form.blocks, pattern, share)
            times = time_form(form, tensors[form.dim], made[key])
            density = made[key].density()
            yield facts | {"pattern": pattern, "density": density} | rates(shape, density, times)


def rates(shape: dict, density: float, times: dict[str, float]) -> dict[str, float]:
    """Times and TFLOP/s of the kept blocks, in 8 bits also with quantising."""
    flops = 4 * shape["dim"] * shape["heads"] * shape["tokens"] ** 2 * density
    found = times | {"tflops": flops / times["ms"] / 1e9}
    if "quantise_ms" in times:
        found["tflops_with"] = flops / (times["ms"] + times["quantise_ms"]) / 1e9
    return found


def cudnn(tensors: list[Tensor], shape: dict) -> dict:
    """Dense attention of cuDNN."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        ms = milliseconds(lambda: scaled_dot_product_attention(*tensors))
    facts = {"group": "dense", "name": "cuDNN", "dim": shape["dim"], "pattern": "all"}
    return facts | {"density": 1.0} | rates(shape, 1.0, {"ms": ms})


def line(row: dict) -> str:
    """A row of the printed table."""
    blocks = "x".join(map(str, row.get("blocks", ())))
    head = f"{row['group']:6} D={row['dim']:<3} {blocks:7} {row.get('precision', 'bf16'):9}"
    if "note" in row:
        return f"{head} {row['name']:28} {row['note']}"
    extra = f"  {row['tflops_with']:6.1f} with quantising" if "tflops_with" in row else ""
    return (
        f"{head} {row['name']:28} {row['pattern']:6} {row['density']:5.3f} {row['ms']:8.3f} ms "
        f"{row['tflops']:6.1f} TFLOP/s{extra}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    groups = ["wide", "narrow", "rows", "eight"]
    parser.add_argument("--only", nargs="+", choices=groups, default=groups)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--check", action="store_true", help="which forms are right, no times")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    every = forms(options.only)
    if options.check:
        for form, fault in faults(every, options.workers).items():
            print(line({**vars(form), "note": fault or "right"}), flush=True)
        return
    torch.manual_seed(0)
    rows = []
    with torch.inference_mode():
        for row in rows_of(every, faults(every, options.workers)):
            rows.append(row)
            print(line(row), flush=True)
    if options.csv is not None:
        names = dict.fromkeys(name for row in rows for name in row)
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(names))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
