"""What the families' processors share: heads apart, projected, normalised."""

import torch
from torch import Tensor

VIDEO = ("to_q", "to_k", "to_v")
TEXT = ("add_q_proj", "add_k_proj", "add_v_proj")

Triple = tuple[Tensor, Tensor, Tensor]


def project(attn: torch.nn.Module, x: Tensor, names: tuple[str, str, str] = VIDEO) -> Triple:
    """Queries, keys and values `[B, S, H, D]` of x `[B, S, C]` by the layers `names` of attn."""
    return tuple(getattr(attn, name)(x).unflatten(2, (attn.heads, -1)) for name in names)


def normalise(query: Tensor, key: Tensor, norms: tuple) -> tuple[Tensor, Tensor]:
    """query and key through their norms, of which either may be None."""
    norm_q, norm_k = norms
    return (
        query if norm_q is None else norm_q(query),
        key if norm_k is None else norm_k(key),
    )


def joined(first: Triple, last: Triple) -> Triple:
    """Both sequences as one: `[B, S, H, D]` and `[B, T, H, D]` -> `[B, S + T, H, D]`."""
    return tuple(torch.cat(pair, dim=1) for pair in zip(first, last, strict=True))


def take_neither(encoder_hidden_states: Tensor | None, attention_mask: Tensor | None) -> None:
    """Raises ValueError for what self-attention over all of an image or video does not take."""
    if encoder_hidden_states is not None or attention_mask is not None:
        raise ValueError("This self-attention takes neither encoder states nor a mask.")
