"""Sequence parallelism: between a part of the tokens with all heads, and all tokens with some."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.context_parallel import ContextParallelSplitHook
from torch import Tensor

from vdit_sparse.call import Heads
from vdit_sparse.grid import Grid
from vdit_sparse.pipelines.families import Family

RING = (
    "ring attention has only a part of the keys at a time, and a block mask goes over all of them"
)


@dataclass(frozen=True)
class LocalHeads(Heads):
    """A process's share of a layer's heads: the `rank`-th of contiguous shares of `count` heads,
    as equal as `torch.tensor_split` makes them."""

    group: dist.ProcessGroup
    count: int

    def total(self, own: int) -> int:
        """How many heads the layer has."""
        return self.count

    def own(self, x: Tensor, dim: int) -> Tensor:
        """This process's part of x, which has all heads along `dim`."""
        return x.tensor_split(self.group.size(), dim)[self.group.rank()]

    def all(self, x: Tensor, dim: int) -> Tensor:
        """x of all heads, from the parts that the processes have along `dim`."""
        shape = list(x.shape)
        shape[dim] = self.count
        whole = x.new_zeros(shape)
        self.own(whole, dim).copy_(x)
        dist.all_reduce(whole, group=self.group)
        return whole


@dataclass(frozen=True, eq=False)
class Exchange:
    """Ulysses (arXiv 2309.14509) for the self-attention of one model call.

    Every process has a part of each of the sequence's `parts` (lengths in the model's order: prompt
    and video of a joint model are split each for itself), and gets all tokens, in the model's own
    order, with its share of the heads. diffusers' own exchange leaves them in the order of the
    processes, `[prompt 0, video 0, prompt 1, video 1]`, and knows no sparse kernel.
    """

    group: dist.ProcessGroup
    parts: tuple[int, ...]

    @cached_property
    def tokens(self) -> list[list[int]]:
        """Tokens of each part, for each process."""
        return [list(x) for x in zip(*(self._shares(part) for part in self.parts), strict=True)]

    def heads(self, count: int) -> LocalHeads:
        """This process's share of `count` heads. Raises ValueError if some process has none."""
        if count < self.group.size():
            raise ValueError(
                f"{count} attention heads do not go round {self.group.size()} processes: use a "
                "smaller ulysses_degree."
            )
        return LocalHeads(self.group, count)

    def gather(self, *tensors: Tensor) -> list[Tensor]:
        """Some tokens of all heads `[B, S_local, H, D]` -> all tokens of some heads
        `[B, S, H_local, D]`; one is on its way while the next is packed. Raises ValueError for
        another S_local than the parts say."""
        under_way = [self._send(x.split(self._shares(x.shape[2]), 2), x) for x in tensors]
        return [self._in_order(*one) for one in under_way]

    def scatter(self, x: Tensor, heads: int) -> Tensor:
        """The inverse of `gather` for one tensor; heads: how many the layer has."""
        batch, _, _, dim = x.shape
        out = x.new_empty(batch, sum(self._own), heads, dim)
        columns = out.split(self._shares(heads), 2)
        own = columns[self.group.rank()]
        received = [own if part is own else part.new_empty(part.shape) for part in columns]
        works, sent = self._swap(self._by_process(x, 1), received)
        for work in works:
            work.wait()
        del sent  # it had to live until it was gone
        for column, part in zip(columns, received, strict=True):
            if column is not own:
                column.copy_(part)
        return out

    def mask(self, mask: Tensor | None) -> Tensor | None:
        """A mask of this process's keys `[..., S_local]` as one of all, in the model's order; a
        mask of all keys stays as it is."""
        tokens = sum(self.parts)
        if mask is None or mask.shape[-1] == tokens:
            return mask
        kind = torch.uint8 if mask.dtype == torch.bool else mask.dtype
        whole = torch.zeros(*mask.shape[:-1], tokens, dtype=kind, device=mask.device)
        places = self._by_process(whole, -1)[self.group.rank()]
        for place, own in zip(places, mask.split(self._own, -1), strict=True):
            place.copy_(own)
        dist.all_reduce(whole, group=self.group)
        return whole.to(mask.dtype)

    @property
    def _own(self) -> list[int]:
        return self.tokens[self.group.rank()]

    def _send(self, pieces: tuple[Tensor, ...], x: Tensor) -> tuple:
        """Begins to send each process its heads of x: the works, what is sent, and what comes, all
        in one buffer."""
        batch, tokens, _, dim = x.shape
        rank = self.group.rank()
        if tokens != sum(self._own):
            raise ValueError(
                f"Expected {sum(self._own)} tokens in process {rank} of {self.group.size()}, among "
                f"which parts of {self.parts} tokens are split, got {tokens}. The plan given to "
                "enable_parallelism must be vdit_sparse.context_parallel_plan's."
            )
        own = pieces[rank].shape[2]
        sizes = [(batch, sum(tokens), own, dim) for tokens in self.tokens]
        counts = [math.prod(size) for size in sizes]
        buffer = x.new_empty(sum(counts))
        received = [x.view(size) for x, size in zip(buffer.split(counts), sizes, strict=True)]
        return *self._swap([[piece] for piece in pieces], received), received, buffer

    def _in_order(self, works: list, sent: list, received: list, buffer: Tensor) -> Tensor:
        """What the processes sent as the model's sequence; what this one sent must live until it
        is gone."""
        for work in works:
            work.wait()
        batch, _, heads, dim = received[0].shape
        if batch == 1 and len(self.parts) == 1:
            return buffer.view(1, -1, heads, dim)
        chunks = zip(received, self.tokens, strict=True)
        apart = [chunk.split(tokens, 1) for chunk, tokens in chunks]
        return torch.cat([x for part in zip(*apart, strict=True) for x in part], dim=1)

    def _by_process(self, x: Tensor, dim: int) -> list[tuple[Tensor, ...]]:
        """Views of x, which has all tokens along `dim`: the parts of each process."""
        apart = [part.tensor_split(self.group.size(), dim) for part in x.split(self.parts, dim)]
        return list(zip(*apart, strict=True))

    def _swap(self, pieces: list, places: list[Tensor]) -> tuple[list[dist.Work], list[Tensor]]:
        """Begins to send each process its pieces, joined along dim 1, and to receive theirs in
        `places`, contiguous but for this process's own: the works, and what is sent. What stays
        here is copied while the rest is on its way."""
        rank, peers = self.group.rank(), dist.get_process_group_ranks(self.group)
        sent, swaps = [], []
        for to, peer in enumerate(peers):
            if to != rank:
                sent.append(torch.cat(tuple(pieces[to]), dim=1))
                swaps.append(dist.P2POp(dist.isend, sent[-1], peer, self.group))
                swaps.append(dist.P2POp(dist.irecv, places[to], peer, self.group))
        works = dist.batch_isend_irecv(swaps)
        lengths = [piece.shape[1] for piece in pieces[rank]]
        for place, piece in zip(places[rank].split(lengths, 1), pieces[rank], strict=True):
            place.copy_(piece)
        return works, sent

    def _shares(self, count: int) -> list[int]:
        size = self.group.size()
        return [count // size + (rank < count % size) for rank in range(size)]


def check_split(transformer: torch.nn.Module, family: Family) -> None:
    """Raises ValueError if sparse attention cannot run on a transformer as its tokens are split
    over GPUs."""
    config = _context_parallel(transformer)
    if config is None:
        return
    if config.ring_degree > 1:
        reason = f"{RING}; use ulysses_degree instead of ring_degree={config.ring_degree}"
    elif family.parallel is None:
        reason = "its tokens cannot be split over GPUs, for there is no plan for it"
    else:
        reason = family.parallel.refuses(transformer)
    if reason:
        raise ValueError(f"No sparse attention for {type(transformer).__name__} here: {reason}.")


def has_no_stock_split(transformer: torch.nn.Module) -> bool:
    """Whether a transformer's tokens are split by a plan of ours, for its class has none."""
    split = _context_parallel(transformer) is not None
    return split and type(transformer)._cp_plan is None


def exchange_of(
    transformer: torch.nn.Module, family: Family, grid: Grid, lead: int
) -> Exchange | None:
    """The exchange of a call, or None where the tokens are in one process.

    Raises ValueError for a sequence that does not divide among the processes (unless
    `ulysses_anything`).
    """
    config = _context_parallel(transformer)
    if config is None:
        return None
    parts, size = family.parallel.parts(grid, lead), config.ulysses_degree
    odd = [part for part in parts if part % size]
    if odd and not config.ulysses_anything:
        raise ValueError(
            f"Sequences of {' and '.join(map(str, odd))} tokens do not divide among {size} "
            "processes: use ulysses_anything=True, another size, or another ulysses_degree."
        )
    return Exchange(config._ulysses_mesh.get_group(), parts)


def tensor_parallel_group(transformer: torch.nn.Module) -> dist.ProcessGroup | None:
    """The processes that share a transformer's heads by tensor parallelism, or None."""
    config = getattr(transformer, "_parallel_config", None)
    if config is None or config.tensor_parallel_config is None:
        return None
    return config.tensor_parallel_config._mesh.get_group()


def is_outermost(hook: ModelHook, transformer: torch.nn.Module) -> bool:
    """Whether `hook` sees the root's arguments before they are split: the hook that was registered
    last runs first."""
    hooks = list(HookRegistry.check_if_exists_or_initialize(transformer).hooks.values())
    later = hooks[hooks.index(hook) + 1 :]
    return not any(isinstance(other, ContextParallelSplitHook) for other in later)


def _context_parallel(transformer: torch.nn.Module) -> ContextParallelConfig | None:
    config = getattr(transformer, "_parallel_config", None)
    return config and config.context_parallel_config
