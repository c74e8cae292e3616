"""Stage `structure`: how much attention the best key blocks hold, per layer, head and step.

This is what block-sparse attention lives on: if a quarter of the key blocks holds most of a query
block's attention, three quarters need not be computed. Real and random weights differ most here.
"""

from dataclasses import dataclass, field
from itertools import product

import torch
import torch.nn.functional as F
from diffusers import WanPipeline
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch import Tensor

from vdit_sparse.pipelines.mini.training.clips import ClipShape
from vdit_sparse.pipelines.mini.training.pacing import report
from vdit_sparse.pipelines.mini.training.sample import Sampling, generate
from vdit_sparse.pipelines.wan_attention import query_key_value

BLOCK = 64
SHARES = (0.10, 0.25, 0.50)
STEPS = (2, 8, 13)
# Query blocks at a time: with 3,136 tokens the scores of 8 are 6.4 MB.
_QUERY_BLOCKS = 8


@dataclass
class Recorder:
    """Counts the transformer's calls and collects `[heads, shares]` per recorded (step, layer).

    Guidance calls the transformer twice a step, first with the prompt: only that call counts.
    """

    steps: tuple[int, ...] = STEPS
    calls: int = -1
    found: dict[tuple[int, int], list[Tensor]] = field(default_factory=dict)

    def start_call(self, *_: object) -> None:
        """Counts a call of the transformer; a forward pre-hook."""
        self.calls += 1

    @property
    def step(self) -> int | None:
        """The denoising step to record now, or None."""
        step, unconditional = divmod(self.calls, 2)
        return step if step in self.steps and not unconditional else None


class RecordingProcessor:
    """The stock processor, with the attention's block masses written down beside it.

    Args:
        stock: the processor that computes the output.
        layer: index of the layer.
        recorder: shared by all layers.
    """

    def __init__(self, stock: WanAttnProcessor, layer: int, recorder: Recorder) -> None:
        self.stock, self.layer, self.recorder = stock, layer, recorder

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Records if this step is wanted, then answers as the stock processor does."""
        if self.recorder.step is not None:
            query, key, _ = query_key_value(attn, hidden_states, rotary_emb)
            heads = [
                best_block_mass(query[0, :, head], key[0, :, head]) for head in range(attn.heads)
            ]
            place = (self.recorder.step, self.layer)
            self.recorder.found.setdefault(place, []).append(torch.stack(heads).cpu())
        return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)


@torch.no_grad()
def best_block_mass(
    query: Tensor, key: Tensor, shares: tuple[float, ...] = SHARES, block: int = BLOCK
) -> Tensor:
    """Returns the attention that each query block's best key blocks hold, averaged over blocks.

    Exact: the softmax of every query over all keys. A share that is no whole number of blocks
    takes that part of the next best block.

    Args:
        query: `[tokens, head_dim]` of one head.
        key: `[tokens, head_dim]`.
        shares: of the key blocks, 0 to 1.
        block: tokens in a query block and in a key block; the last ones may be shorter.

    Returns:
        `[shares]` float32, 0 to 1.
    """
    tokens = len(key)
    blocks = -(-tokens // block)
    wanted = torch.tensor(shares, device=key.device) * blocks
    ranks = torch.arange(blocks, device=key.device)
    weights = (wanted[:, None] - ranks).clamp(0, 1)
    masses = []
    for part in query.float().split(block * _QUERY_BLOCKS):
        attention = torch.softmax(part @ key.float().T * query.shape[1] ** -0.5, dim=-1)
        attention = F.pad(attention, (0, blocks * block - tokens))
        per_key_block = attention.unflatten(-1, (blocks, block)).sum(-1)
        per_pair = torch.stack([rows.mean(0) for rows in per_key_block.split(block)])
        best = per_pair.sort(dim=-1, descending=True).values
        masses.append(best @ weights.T)
    return torch.cat(masses).mean(0)


def measure(
    pipeline: WanPipeline, prompts: tuple[str, ...], shape: ClipShape, sampling: Sampling
) -> dict[tuple[int, int], Tensor]:
    """Runs the prompts and returns `{(step, layer): [heads, shares]}`, averaged over prompts.

    The pipeline's processors are the same before and after.
    """
    transformer, recorder = pipeline.transformer, Recorder()
    stock = [block.attn1.processor for block in transformer.blocks]
    hook = transformer.register_forward_pre_hook(recorder.start_call)
    try:
        for layer, block in enumerate(transformer.blocks):
            block.attn1.set_processor(RecordingProcessor(stock[layer], layer, recorder))
        for index, prompt in enumerate(prompts):
            recorder.calls = -1
            seeded = Sampling(sampling.steps, sampling.guidance, sampling.seed + index)
            generate(pipeline, prompt, shape, seeded)
            report(f"measured the attention of {prompt!r}")
    finally:
        hook.remove()
        for block, processor in zip(transformer.blocks, stock, strict=True):
            block.attn1.set_processor(processor)
    return {place: torch.stack(runs).mean(0) for place, runs in recorder.found.items()}


def table(found: dict[tuple[int, int], Tensor]) -> str:
    """Writes two Markdown tables: all layers together, and every layer at the middle share."""
    steps = sorted({step for step, _ in found})
    layers = sorted({layer for _, layer in found})
    lines = ["| step | best blocks | mean | least head | median head | greatest head |"]
    lines.append("|---" * 6 + "|")
    for step, (index, share) in product(steps, enumerate(SHARES)):
        heads = torch.cat([found[step, layer][:, index] for layer in layers])
        figures = (heads.mean(), heads.min(), heads.median(), heads.max())
        lines.append(f"| {step} | {share:.0%} | " + _row(figures))
    middle = SHARES[1]
    lines += ["", f"Attention in the best {middle:.0%} of key blocks: least / mean / greatest head"]
    lines += ["", "| layer | " + " | ".join(f"step {step}" for step in steps) + " |"]
    lines.append("|---" * (len(steps) + 1) + "|")
    for layer in layers:
        cells = []
        for step in steps:
            heads = found[step, layer][:, 1]
            cells.append(f"{heads.min():.2f} / {heads.mean():.2f} / {heads.max():.2f}")
        lines.append(f"| {layer} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _row(figures: tuple[Tensor, ...]) -> str:
    return " | ".join(f"{figure:.2f}" for figure in figures) + " |"
