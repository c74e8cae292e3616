"""When a processor may take norm and RoPE of queries and keys in the one pass of
`kernels.qk_prepare`, which reads their norms' weights past the norms themselves."""

import torch
from torch import Tensor

from vdit_sparse.kernels.qk_prepare import why_not
from vdit_sparse.pipelines.processor import SparseAttnProcessor


def is_one_pass(
    processor: SparseAttnProcessor,
    query: Tensor,
    norms: tuple[torch.nn.Module, ...],
    kind: type[torch.nn.Module],
    rotary: tuple[Tensor, Tensor] | None,
) -> bool:
    """Whether the one pass may stand in for `norms` of queries as projected, and for their RoPE.

    It rounds as diffusers does, but not always to the same bit, and a dense eager call is promised
    to equal stock: there only where the method is sparse. In a compiled graph, which serves dense
    and sparse calls and whose compiler rounds in its own places, always. The norms must be of class
    `kind`, with weights that are there, and nothing may stand around their `forward`.
    """
    return (
        not torch.is_grad_enabled()
        and all(_is_bare(norm, kind) and norm.eps == norms[0].eps for norm in norms)
        and all(why_not(query, norm.weight, rotary) is None for norm in norms)
        and (torch.compiler.is_compiling() or processor.is_sparse())
    )


def _is_bare(norm: torch.nn.Module, kind: type[torch.nn.Module]) -> bool:
    """Whether `forward` is all that calling a norm does, and its weight may be read without it.

    Offloading and layerwise casting bring a weight to its device and dtype when its module is
    called, by a hook (torch's) or a `forward` of the instance (accelerate's, diffusers'); sharded
    and quantized weights are other classes than Parameter. A weight that a hook of a whole block
    has brought is there; where it is not, `why_not` sees its device and dtype.
    """
    return (
        type(norm) is kind
        and type(norm.weight) is torch.nn.Parameter
        and norm.eps is not None
        and getattr(norm, "bias", None) is None
        and "forward" not in vars(norm)
        and not norm._forward_pre_hooks
        and not norm._forward_hooks
    )
