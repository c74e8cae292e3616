"""Stage `structure`: how much attention the best key blocks hold, per layer, head and step.

This is what block-sparse attention lives on: if a quarter of the key blocks holds most of a query
block's attention, three quarters need not be computed; and if they are the same ones in the next
step, they need not be searched again. Real and random weights differ most here.
"""

from dataclasses import dataclass, field

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
STABLE_SHARE = 0.25
"""Share of the key blocks whose staying is measured, from each of `STEPS` to the next step."""
# Query blocks at a time: with 3,136 tokens the scores of 8 are 6.4 MB.
_QUERY_BLOCKS = 8


@dataclass
class Recorder:
    """Counts the transformer's calls and collects what is measured per recorded (step, layer).

    Guidance calls the transformer twice a step, first with the prompt: only that call counts.

    Attributes:
        steps: recorded; of the step after each only the best blocks are, for `stability`.
        calls: of the transformer in this run, counted from 0.
        mass: (step, layer) -> one `[heads, shares]` a run.
        stability: (step, layer) -> one `[heads]` a run.
        best: (step, layer) -> `[heads, query blocks, key blocks]` of this run.
    """

    steps: tuple[int, ...] = STEPS
    calls: int = -1
    mass: dict[tuple[int, int], list[Tensor]] = field(default_factory=dict)
    stability: dict[tuple[int, int], list[Tensor]] = field(default_factory=dict)
    best: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def start_call(self, *_: object) -> None:
        """Counts a call of the transformer; a forward pre-hook."""
        self.calls += 1

    @property
    def step(self) -> int | None:
        """The denoising step to record now, or None."""
        step, unconditional = divmod(self.calls, 2)
        wanted = step in self.steps or step - 1 in self.steps
        return step if wanted and not unconditional else None

    def record(self, layer: int, masses: Tensor) -> None:
        """Keeps what is wanted of a layer's `block_masses [heads, query blocks, key blocks]`."""
        place, before = (self.step, layer), (self.step - 1, layer)
        self.best[place] = best_blocks(masses, STABLE_SHARE)
        if self.step in self.steps:
            self.mass.setdefault(place, []).append(mass_in_best(masses).cpu())
        if self.step - 1 in self.steps:
            kept = (self.best[place] & self.best[before]).sum((1, 2))
            share = kept / self.best[before].sum((1, 2))
            self.stability.setdefault(before, []).append(share.cpu())


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
            heads = range(attn.heads)
            masses = [block_masses(query[0, :, head], key[0, :, head]) for head in heads]
            self.recorder.record(self.layer, torch.stack(masses))
        return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)


@torch.no_grad()
def block_masses(query: Tensor, key: Tensor, block: int = BLOCK) -> Tensor:
    """Returns the attention of each query block that each key block holds.

    Exact: the softmax of every query over all keys, summed over a key block and averaged over the
    queries of a block.

    Args:
        query: `[tokens, head_dim]` of one head.
        key: `[tokens, head_dim]`.
        block: tokens in a query block and in a key block; the last ones may be shorter.

    Returns:
        `[query blocks, key blocks]` float32; rows add up to 1.
    """
    tokens = len(key)
    blocks = -(-tokens // block)
    rows = []
    for part in query.float().split(block * _QUERY_BLOCKS):
        attention = torch.softmax(part @ key.float().T * query.shape[1] ** -0.5, dim=-1)
        attention = F.pad(attention, (0, blocks * block - tokens))
        per_key_block = attention.unflatten(-1, (blocks, block)).sum(-1)
        rows += [each.mean(0) for each in per_key_block.split(block)]
    return torch.stack(rows)


def mass_in_best(masses: Tensor, shares: tuple[float, ...] = SHARES) -> Tensor:
    """Returns what each query block's best key blocks hold, averaged over query blocks.

    A share that is no whole number of blocks takes that part of the next best block.

    Args:
        masses: `[..., query blocks, key blocks]`.
        shares: of the key blocks, 0 to 1.

    Returns:
        `[..., shares]` float32, 0 to 1.
    """
    blocks = masses.shape[-1]
    wanted = torch.tensor(shares, device=masses.device) * blocks
    weights = (wanted[:, None] - torch.arange(blocks, device=masses.device)).clamp(0, 1)
    best = masses.sort(dim=-1, descending=True).values
    return (best @ weights.T).mean(-2)


def best_blocks(masses: Tensor, share: float) -> Tensor:
    """Returns which key blocks are each query block's best, rounded to a whole number of at least
    one: bool, of the shape of `masses [..., query blocks, key blocks]`."""
    count = max(1, round(share * masses.shape[-1]))
    chosen = masses.topk(count, dim=-1).indices
    return torch.zeros_like(masses, dtype=torch.bool).scatter_(-1, chosen, True)


@dataclass(frozen=True)
class Structure:
    """What `measure` found, averaged over prompts.

    Attributes:
        mass: (step, layer) -> `[heads, shares]`, attention in the best `SHARES` of the key blocks.
        stability: (step, layer) -> `[heads]`, the share of the best quarter of the key blocks that
            is among the best quarter of the next step too; by chance it would be a quarter.
    """

    mass: dict[tuple[int, int], Tensor]
    stability: dict[tuple[int, int], Tensor]


def measure(
    pipeline: WanPipeline, prompts: tuple[str, ...], shape: ClipShape, sampling: Sampling
) -> Structure:
    """Runs the prompts; the pipeline's processors are the same before and after."""
    transformer, recorder = pipeline.transformer, Recorder()
    stock = [block.attn1.processor for block in transformer.blocks]
    hook = transformer.register_forward_pre_hook(recorder.start_call)
    try:
        for layer, block in enumerate(transformer.blocks):
            block.attn1.set_processor(RecordingProcessor(stock[layer], layer, recorder))
        for index, prompt in enumerate(prompts):
            recorder.calls, recorder.best = -1, {}
            seeded = Sampling(sampling.steps, sampling.guidance, sampling.seed + index)
            generate(pipeline, prompt, shape, seeded)
            report(f"measured the attention of {prompt!r}")
    finally:
        hook.remove()
        for block, processor in zip(transformer.blocks, stock, strict=True):
            block.attn1.set_processor(processor)
    mass, stability = (
        {place: torch.stack(runs).mean(0) for place, runs in found.items()}
        for found in (recorder.mass, recorder.stability)
    )
    return Structure(mass, stability)
