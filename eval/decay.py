"""How attention mass falls with the distance in frames, and how much of it a method's mask keeps.

    python -m vdit_sparse.eval.decay --preset radial-mini

One prompt of the bundled model, without guidance, all heads at one step of dense attention. Blocks
of 64 tokens count for the frame of their first token (exact where a frame is whole blocks).
"""

import argparse
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vdit_sparse.call import Call
from vdit_sparse.eval.denoise import latents
from vdit_sparse.grid import Grid
from vdit_sparse.kernels.block_mask import BlockMask
from vdit_sparse.kernels.block_mass import block_mass
from vdit_sparse.kernels.block_sparse import block_sparse_attention
from vdit_sparse.method import Plan, SparseAttention
from vdit_sparse.pipelines.attach import apply
from vdit_sparse.pipelines.families import preset
from vdit_sparse.pipelines.load import load_pipeline

BLOCK = 64


@dataclass(frozen=True, kw_only=True)
class MassRecorder(SparseAttention):
    """Dense attention that writes down the share of mass in each block, `[B, H, nb, nb]` a call,
    and the same mask's blocks of `method`, at step `at`."""

    method: SparseAttention
    at: int
    seen: list[tuple[Grid, Tensor, Tensor]] = field(default_factory=list, compare=False, repr=False)

    def plan(self, q: Tensor, k: Tensor, call: Call) -> Plan:
        return self.method.plan(q, k, call)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        everything = BlockMask.full(call.grid.tokens, block=BLOCK, device=q.device)
        out, lse = block_sparse_attention(q, k, v, everything)
        call.note.density = 1.0
        if call.step == self.at:
            mass = block_mass(q, k, lse, BLOCK) / call.grid.tokens
            self.seen.append((call.grid, mass.cpu(), self.plan(q, k, call).mask.keep().cpu()))
        return out


def report(seen: list[tuple[Grid, Tensor, Tensor]]) -> str:
    """The means over heads as lines."""
    grid = seen[0][0]
    mass = torch.cat([mass for _, mass, _ in seen]).flatten(0, 1)
    keep = torch.cat([keep.expand_as(mass) for _, mass, keep in seen]).flatten(0, 1)
    frame = torch.arange(mass.shape[-1]) * BLOCK // grid.frame_tokens
    distance = (frame[:, None] - frame).abs()
    lines = ["frames apart   mass   of a pair of frames   kept"]
    for d in range(grid.frames):
        here = distance == d
        pairs = grid.frames if d == 0 else 2 * (grid.frames - d)
        share = float((mass * here).sum((-1, -2)).mean())
        kept = float((mass * (here & keep)).sum((-1, -2)).mean())
        lines.append(f"{d:12}  {share:.3f}   {share * grid.frames / pairs:19.3f}  {kept:.3f}")
    lost = (mass * ~keep).sum((-1, -2))
    cuts = ", ".join(f"{x:.3f}" for x in lost.quantile(torch.tensor([0.25, 0.5, 0.75, 1.0])))
    return "\n".join([*lines, f"mass that a head loses: quartiles and most {cuts}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="radial-mini", help="a method without token order")
    parser.add_argument("--prompt", default="a red car rises up above the ocean")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--at", type=int, default=5)
    options = parser.parse_args()
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    method = replace(preset(pipe.transformer, options.preset), dense_steps=0)
    recorder = MassRecorder(method=method, at=options.at)
    apply(pipe, recorder)
    inputs = {"prompt": options.prompt, "seed": 1, "guidance_scale": 1.0}
    with torch.inference_mode():
        latents(pipe, {**inputs, "num_inference_steps": options.steps})
    print(report(recorder.seen))


if __name__ == "__main__":
    main()
