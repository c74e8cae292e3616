"""The base of the families' processors, and the one operator that they all go through."""

import weakref

import torch
import torch.nn.functional as F
from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

# A compiled block knows its run by number: an int is a guard that never changes.
RUNS = weakref.WeakValueDictionary()


class SparseAttnProcessor:
    """Base of the families' processors: a stock processor whose attention goes through the run.

    A subclass defines `__call__` with the stock processor's argument names (diffusers drops
    others), brings query, key, value `[B, S, H, D]` in the model's own token order to `attend`, and
    continues as stock does. It overrides `dense` where stock does not go through diffusers'
    dispatcher, and `keys` where its mask is no mask of keys.
    """

    # diffusers sets both. The run, and not the dispatcher, exchanges tokens between GPUs.
    _attention_backend = None
    _parallel_config = None

    def __init__(self, run: int, layer: int):
        self.run = run
        # A tensor, not an int: one compiled graph serves all layers.
        self.layer = torch.tensor(layer)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Dense or sparse attention `[B, S, H, D]` -> `[B, S, H, D]`, as the method decides.
        mask: as the stock processor gets it."""
        if torch.is_grad_enabled() and query.requires_grad:
            raise RuntimeError(
                "vdit_sparse is inference only, but the model runs under autograd; use "
                "torch.no_grad(), or vdit_sparse.remove(...) to train."
            )
        if not torch.compiler.is_compiling() and _scores_are_skipped():
            return value
        return torch.ops.vdit_sparse.attend(query, key, value, self.layer, self.run, mask)

    def is_sparse(self) -> bool:
        """Whether the method will be sparse in this call. Not to be asked in a compiled graph,
        which serves dense and sparse calls."""
        return RUNS[self.run].is_sparse(int(self.layer))

    def dense(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """The stock attention `[B, S, H, D]` -> `[B, S, H, D]`, through diffusers' dispatcher."""
        return dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=mask,
            backend=self._attention_backend,
        )

    def sparse(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """query, key, value `[B, S, H, D]` as a method gets them. A mask that adds to the scores
        may be told by more channels, which are cut off the output again."""
        return query, key, value

    def keys(self, mask: Tensor | None, query: Tensor) -> Tensor | None:
        """Which keys the stock mask leaves visible, bool `[B, S]` in the model's order, or None if
        all. Raises ValueError for a mask that says more than that."""
        if mask is None:
            return None
        rows, tokens = query.shape[:2]
        if mask.dtype != torch.bool or mask.numel() not in (tokens, rows * tokens):
            raise ValueError(
                f"{type(self).__name__} takes a bool mask of {rows} x {tokens} keys, got "
                f"{mask.dtype} {tuple(mask.shape)}."
            )
        return mask.reshape(-1, tokens).expand(rows, tokens)


class SDPASparseAttnProcessor(SparseAttnProcessor):
    """For models whose stock processor calls SDPA itself, which no attention backend reaches."""

    def dense(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """The stock attention `[B, S, H, D]` -> `[B, S, H, D]`, through SDPA."""
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _scores_are_skipped() -> bool:
    """Whether perturbed-attention guidance asks SDPA for its values: it does so by intercepting the
    function, which our operator hides."""
    modes = torch.overrides._get_current_function_mode_stack()
    return any(isinstance(mode, AttentionScoreSkipFunctionMode) for mode in modes)


def skipped(module, hidden_states=None, encoder_hidden_states=None, *args, **kwargs):
    """What a layer returns whose attention a guider skips: its inputs."""
    if encoder_hidden_states is None:
        return hidden_states
    return hidden_states, encoder_hidden_states


@torch.library.custom_op("vdit_sparse::attend", mutates_args=())
def _attend(
    query: Tensor, key: Tensor, value: Tensor, layer: Tensor, run: int, mask: Tensor | None
) -> Tensor:
    return RUNS[run].attend(int(layer), query, key, value, mask)


@_attend.register_fake
def _(query, key, value, layer, run, mask):
    return query.new_empty(query.shape)
