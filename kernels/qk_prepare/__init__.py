"""From projections to attention in one pass: RMSNorm, RoPE, and the token order of a plan.

    q, k = prepare_wan(query, key, norm_q.weight, norm_k.weight, eps, rotary)
    out = merge_heads(attention, back)

`reference.py` is the specification in plain torch and rounds where diffusers rounds; `triton.py` is
the path of GPUs: it reads each row once and writes it once, where diffusers' own operations do so
three times each. The functions for a model family take tensors only, so that its processor can call
them in the place of its norms and rotations. `blocks.py` adds block means.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

from vdit_sparse.kernels import backends
from vdit_sparse.kernels.checks import (
    DTYPES,
    check_device,
    check_inference,
    check_last_stride,
)
from vdit_sparse.kernels.reorder.checks import check_order

__all__ = [
    "BACKENDS",
    "merge_heads",
    "prepare",
    "prepare_hunyuan",
    "prepare_wan",
    "why_not",
]

# In the order of preference when none is asked for.
BACKENDS = {
    "triton": "vdit_sparse.kernels.qk_prepare.triton",
    "reference": "vdit_sparse.kernels.qk_prepare.reference",
}
Rotary = tuple[Tensor, Tensor]
_TRITON = find_spec("triton") is not None


def prepare(
    x: Tensor,
    weight: Tensor,
    rotary: Rotary | None = None,
    *,
    eps: float,
    round_first: bool = False,
    tail: Tensor | None = None,
    tail_weight: Tensor | None = None,
    back: Tensor | None = None,
    slots: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """RMSNorm, then RoPE on interleaved pairs, then rows to their places in a plan's order.

    x: `[B, S, H, D]`, queries or keys as projected, fp16, bf16 or fp32, unit last stride, D even;
    weight: of the norm, dtype of x: `[H * D]` normalises each token over all its heads (Wan), `[D]`
        each head by itself (HunyuanVideo); eps: is added to the mean square;
    rotary: cos and sin, fp32 `[R, D]` or `[1, R, 1, D]`, each value twice in a row as diffusers'
        `repeat_interleave` makes them; tokens from R on (text) are normalised only; None rotates
        none;
    round_first: x / rms is rounded to the dtype of x before the weight multiplies it, as in
        `diffusers.models.normalization.RMSNorm`; `torch.nn.RMSNorm` rounds once, after it;
    tail, tail_weight: `[B, T, H, D]` tokens that follow x in the sequence, and their own weight, of
        the same form (the text of a two-stream block): normalised, not rotated;
    back: int32 or int64 `[S + T]` or `[H, S + T]`: new position of each token, each at most once,
        as `kernels.reorder.inverse(order, S + T)` gives; slots: length of that order, default
        S + T;
    backend: "triton" or "reference", which runs or raises; default Triton on a GPU.

    Returns contiguous `[B, slots, H, D]` in the dtype of x; slots that no token goes to are zero if
    there are more of them than tokens. A position outside of the slots is dropped.
    Norm and rotation are computed in fp32 and rounded to the dtype of x after each, as in diffusers
    0.42: a result differs from its own by at most one unit in the last place of the larger number
    of its pair, where fp32 sums in another order fall on the other side of a tie.
    Raises ValueError or TypeError for other shapes, dtypes and strides, RuntimeError under
    autograd. One opaque operator for torch.compile.
    """
    backends.check_name(BACKENDS, backend)
    check_rows(x, weight, "x", "weight")
    tokens = x.shape[1]
    if (tail is None) != (tail_weight is None):
        raise ValueError("tail and tail_weight belong together: give both or neither.")
    if tail is not None:
        _check_tail(x, weight, tail, tail_weight)
        tokens += tail.shape[1]
    cos, sin = checked_tables(x, rotary)
    _check_places(x, tokens, back, slots)
    check_inference("prepare", x=x, weight=weight)
    return _prepare(
        x, weight, cos, sin, tail, tail_weight, back, eps, round_first, slots or tokens, backend
    )


def prepare_wan(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    eps: float,
    rotary: Rotary | None,
    *,
    heads: int,
    back: Tensor | None = None,
    slots: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Queries and keys of a Wan self-attention layer: `norm_q`, `norm_k` and RoPE.

    query, key: `[B, S, H * D]`, what `to_q` and `to_k` give (views of a fused projection too);
    query_weight, key_weight: `[H * D]`, `attn.norm_q.weight` and `attn.norm_k.weight`, torch's own
    RMSNorm; rotary: `[1, S, 1, D]` each, as `WanRotaryPosEmbed` gives. The rest is as in `prepare`.
    Returns two of `[B, slots, H, D]`.
    """
    options = {"eps": eps, "back": back, "slots": slots, "backend": backend}
    return (
        prepare(query.unflatten(2, (heads, -1)), query_weight, rotary, **options),
        prepare(key.unflatten(2, (heads, -1)), key_weight, rotary, **options),
    )


def prepare_hunyuan(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    eps: float,
    rotary: Rotary | None,
    *,
    heads: int,
    text: tuple[Tensor, Tensor] | None = None,
    text_weights: tuple[Tensor, Tensor] | None = None,
    back: Tensor | None = None,
    slots: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Queries and keys of a HunyuanVideo layer, image then text: QK norm of each head, RoPE on the
    image, and in two-stream blocks the concatenation with the text.

    query, key: `[B, S, H * D]`: the image in two-stream blocks, image and text in single-stream
    ones; query_weight, key_weight: `[D]`, `attn.norm_q.weight` and `attn.norm_k.weight`, diffusers'
    RMSNorm; rotary: `[image tokens, D]` each; text, text_weights: what `add_q_proj` and
    `add_k_proj` give, `[B, T, H * D]` each, and the weights of `norm_added_q` and `norm_added_k`,
    `[D]`, which have the same eps; None in single-stream blocks. The rest is as in `prepare`.
    Returns two of `[B, slots, H, D]`.
    """
    options = {"eps": eps, "round_first": True, "back": back, "slots": slots, "backend": backend}
    tails = (None, None) if text is None else [x.unflatten(2, (heads, -1)) for x in text]
    weights = text_weights or (None, None)
    query, key = (
        prepare(
            x.unflatten(2, (heads, -1)), weight, rotary,
            tail=tail, tail_weight=tail_weight, **options,
        )
        for x, weight, tail, tail_weight in zip(
            (query, key), (query_weight, key_weight), tails, weights, strict=True
        )
    )  # fmt: skip
    return query, key


def merge_heads(x: Tensor, back: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """Rows of an attention's output back in the order of the sequence, heads side by side.

    x: `[B, H, S', D]`, any dtype, unit last stride; back: int32 or int64 `[S]` or `[H, S]`, the
    position in S' of each token, as in `prepare`; None for the order of the sequence.
    Returns contiguous `[B, S, H * D]`, the same bits. A token of position -1 gets zeros.
    Raises ValueError or TypeError for other shapes and dtypes, RuntimeError under autograd.
    """
    backends.check_name(BACKENDS, backend)
    if x.ndim != 4 or x.numel() == 0:
        raise ValueError(f"x must be [B, H, S, D], not empty; got {tuple(x.shape)}.")
    check_last_stride(x=x)
    if back is not None:
        check_order(x, back)
    check_inference("merge_heads", x=x)
    return _merge(x, back, backend)


def why_not(x: Tensor, weight: Tensor | None, rotary: Rotary | None) -> str | None:
    """None if a processor should prepare its queries or keys x, of any shape, in one pass; else the
    reason to leave norm and RoPE to diffusers. Can be asked inside of a compiled graph."""
    if not x.is_cuda or not _TRITON:
        return "it needs a GPU, and Triton"
    # Layerwise casting and offloading keep weights elsewhere until their module is called.
    if weight is None or weight.dtype != x.dtype or weight.device != x.device:
        return "the norm has no weight in the dtype and on the device of the queries"
    if rotary is not None and any(table.dtype != torch.float32 for table in rotary):
        return f"the tables of RoPE are {rotary[0].dtype}, not fp32"
    return None


@torch.library.custom_op("vdit_sparse::qk_prepare", mutates_args=())
def _prepare(
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    tail: Tensor | None,
    tail_weight: Tensor | None,
    back: Tensor | None,
    eps: float,
    round_first: bool,
    slots: int,
    backend: str | None,
) -> Tensor:
    module = backends.choose(BACKENDS, backend, x)
    return module.forward(
        x, weight, cos, sin, tail, tail_weight, back, eps, round_first, slots
    )  # fmt: skip


@_prepare.register_fake
def _(x, weight, cos, sin, tail, tail_weight, back, eps, round_first, slots, backend):
    return x.new_empty(x.shape[0], slots, *x.shape[2:])


@torch.library.custom_op("vdit_sparse::merge_heads", mutates_args=())
def _merge(x: Tensor, back: Tensor | None, backend: str | None) -> Tensor:
    return backends.choose(BACKENDS, backend, x).merge_heads(x, back)


@_merge.register_fake
def _(x, back, backend):
    tokens = x.shape[2] if back is None else back.shape[-1]
    return x.new_empty(x.shape[0], tokens, x.shape[1] * x.shape[3])


def check_rows(x: Tensor, weight: Tensor, name: str, weight_name: str) -> None:
    """Raises unless x `[B, S, H, D]` and the weight of its norm are what `prepare` takes."""
    if x.ndim != 4 or x.numel() == 0 or x.shape[3] % 2:
        raise ValueError(
            f"{name} must be [B, S, H, D] with an even D, not empty; got {tuple(x.shape)}."
        )
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be fp16, bf16 or fp32, got {x.dtype}.")
    check_last_stride(**{name: x})
    H, D = x.shape[2:]
    if weight.shape not in ((H * D,), (D,)):
        raise ValueError(
            f"{weight_name} must be [{H * D}] (over all heads) or [{D}] (each head), got "
            f"{tuple(weight.shape)}."
        )
    if weight.dtype != x.dtype:
        raise TypeError(f"{weight_name} must be {x.dtype} like {name}, got {weight.dtype}.")
    check_device(weight, weight_name, x, name)


def _check_tail(x: Tensor, weight: Tensor, tail: Tensor, tail_weight: Tensor) -> None:
    check_rows(tail, tail_weight, "tail", "tail_weight")
    same = (tail.shape[0], *tail.shape[2:]) == (x.shape[0], *x.shape[2:])
    if not same or tail.dtype != x.dtype or tail_weight.shape != weight.shape:
        raise ValueError(
            "tail and tail_weight must be like x and weight but for the tokens, got "
            f"{tail.dtype} {tuple(tail.shape)} and {tuple(tail_weight.shape)} beside "
            f"{x.dtype} {tuple(x.shape)} and {tuple(weight.shape)}."
        )
    check_device(tail, "tail", x, "x")


def checked_tables(x: Tensor, rotary: Rotary | None) -> tuple[Tensor | None, Tensor | None]:
    """cos and sin as `[R, D]`, or two of None. Raises unless they are what `prepare` takes."""
    if rotary is None:
        return None, None
    D = x.shape[3]
    tables = [table.squeeze(2).squeeze(0) if table.ndim == 4 else table for table in rotary]
    for name, table in zip(("cos", "sin"), tables, strict=True):
        if table.shape != (tables[0].shape[0], D) or not 0 < table.shape[0] <= x.shape[1]:
            raise ValueError(
                f"{name} must be [R, {D}] or [1, R, 1, {D}] with R from 1 to {x.shape[1]}, the "
                f"tokens of x, got {tuple(table.shape)}."
            )
        if table.dtype != torch.float32:
            raise TypeError(f"{name} must be fp32, as diffusers' tables are, got {table.dtype}.")
        check_device(table, name, x, "x")
        check_last_stride(**{name: table})
    return tables[0], tables[1]


def _check_places(x: Tensor, tokens: int, back: Tensor | None, slots: int | None) -> None:
    if slots is not None and (back is None or slots < 1):
        raise ValueError(f"slots is the length of the order that back inverts, got {slots}.")
    if back is None:
        return
    check_order(x.transpose(1, 2), back)
    if back.shape[-1] != tokens:
        raise ValueError(
            f"back must have a place for each of the {tokens} tokens, got {tuple(back.shape)}."
        )
