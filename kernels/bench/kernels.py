"""The kernels that are compared: ours, torch's, and those of other packages where installed.

Each takes q, k, v `[1, H, S, D]` and, if it is sparse, a mask; the call that is timed holds all
that a transformer would pay for, quantisation and copies included.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from vdit_sparse.kernels.block_mask import BlockMask
from vdit_sparse.kernels.block_sparse import BACKENDS, block_sparse_attention, explain

Attend = Callable[[], Tensor]
# Relative L2 error that an 8-bit kernel may have, its quantising included in what is timed.
EIGHT_BITS = {"int8_bf16": 1.6e-2, "int8_fp8": 4.5e-2}


@dataclass(frozen=True)
class Kernel:
    """One kernel. make: (q, k, v, mask) -> the call to time; sparse: it takes a mask; homes:
    modules of which one has to be there; blocks: sizes of blocks that it takes; limit: relative L2
    error that it may have, None for the rounding of its dtype; ours: the backend, "" for the
    default one, and the precision, whose reasons `explain` knows.
    """

    make: Callable[..., Attend]
    sparse: bool = False
    homes: tuple[str, ...] = ()
    blocks: tuple[int, ...] = (64, 128)
    limit: float | None = None
    ours: tuple[str, str] | None = None

    def why_not(self, tensors: list[Tensor], mask: BlockMask | None) -> str | None:
        """None if it can be tried on these inputs, else the reason why not."""
        q = tensors[0]
        if self.homes and (reason := _found(self.homes)[1]) is not None:
            return reason
        if mask is None:
            return None
        if mask.block_k not in self.blocks:
            return f"takes blocks of {self.blocks}, not of {mask.block_k}"
        if self.homes and mask.valid is not None:
            return "takes no blocks that are padded inside the sequence"
        if self.ours is not None:
            backend, precision = self.ours
            reasons = explain(*tensors, mask, precision)
            if backend == "" and None in reasons.values():
                return None
            return reasons[backend or "triton"]
        return "needs a GPU" if self.homes and q.device.type != "cuda" else None


def _backend(name: str, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Attend:
    return lambda: block_sparse_attention(q, k, v, mask, backend=name)[0]


def _eight_bits(
    precision: str, backend: str, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask
) -> Attend:
    given = {"precision": precision, "backend": backend or None}
    return lambda: block_sparse_attention(q, k, v, mask, **given)[0]


def _pointers(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Attend:
    from vdit_sparse.kernels.block_sparse import triton as backend

    tile = backend.tile_of(q, mask, descriptors=False)
    return lambda: backend.launch(q, k, v, mask, q.shape[-1] ** -0.5, None, tile)[0]


def _sdpa(kind: SDPBackend | None, q: Tensor, k: Tensor, v: Tensor, _: None) -> Attend:
    if kind is None:
        return lambda: scaled_dot_product_attention(q, k, v)

    def attend() -> Tensor:
        with sdpa_kernel(kind):
            return scaled_dot_product_attention(q, k, v)

    return attend


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Attend:
    from torch.nn.attention.flex_attention import flex_attention

    # Past its limit of recompilations dynamo would silently time the unfused eager form.
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    block_mask = mask.to_flex(q.shape[2], k.shape[2])
    return lambda: compiled(q, k, v, block_mask=block_mask)


FA3 = ("fa3_fwd_interface", "flash_attn_interface")


def _flash_3(q: Tensor, k: Tensor, v: Tensor, _: None) -> Attend:
    function = _found(FA3)[0].flash_attn_func
    rows = [x.transpose(1, 2) for x in (q, k, v)]

    def attend() -> Tensor:
        out = function(*rows)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return attend


def _flash_4(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Attend:
    function = import_module("flash_attn.cute").flash_attn_func
    lists = import_module("flash_attn.cute.block_sparsity").BlockSparseTensorsTorch
    counts, columns = listed(mask, q.shape[1])
    none = torch.zeros_like(counts), torch.zeros_like(columns)
    sparse = lists(
        mask_block_cnt=none[0],
        mask_block_idx=none[1],
        full_block_cnt=counts,
        full_block_idx=columns,
        block_size=(mask.block_q, mask.block_k),
    )
    rows = [x.transpose(1, 2) for x in (q, k, v)]
    return lambda: function(*rows, block_sparse_tensors=sparse)[0].transpose(1, 2)


def _cudnn_frontend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Attend:
    function = import_module("cudnn.block_sparse_attention.api").block_sparse_attention_forward
    counts, columns = listed(mask, q.shape[1])
    given = {"q2k_block_nums": counts, "sparse_block_size": mask.block_k}
    return lambda: function(q, k, v, columns, **given)["o_tensor"]


def _xformers(q: Tensor, k: Tensor, v: Tensor, _: None) -> Attend:
    function = import_module("xformers.ops").memory_efficient_attention
    rows = [x.transpose(1, 2) for x in (q, k, v)]
    return lambda: function(*rows).transpose(1, 2)


def _sage(q: Tensor, k: Tensor, v: Tensor, _: None) -> Attend:
    function = import_module("sageattention").sageattn
    # Its first version takes the mean off the keys in place.
    return lambda: function(q, k.clone(), v, tensor_layout="HND")


def listed(mask: BlockMask, heads: int) -> tuple[Tensor, Tensor]:
    """Counts int32 `[1, H, nq]` and kept columns int32 `[1, H, nq, nk]` in ascending order, full
    rows written out, which is what other packages take."""
    keep = mask.keep().expand(1, heads, -1, -1)
    columns = (~keep).to(torch.uint8).argsort(dim=-1, stable=True).to(torch.int32)
    return keep.sum(-1, dtype=torch.int32), columns.contiguous()


def _found(names: tuple[str, ...]) -> tuple[ModuleType | None, str | None]:
    """The first of these modules that can be imported, else the reasons why none can."""
    reasons = []
    for name in names:
        try:
            return import_module(name), None
        # Extensions built for another torch or CUDA fail in many ways while they are loaded.
        except Exception as error:
            reasons.append(f"{name}: {' '.join(str(error).split())[:100]}")
    return None, "; ".join(reasons)


def _eight_bit_kernel(precision: str, backend: str) -> Kernel:
    make = partial(_eight_bits, precision, backend)
    return Kernel(make, sparse=True, limit=EIGHT_BITS[precision], ours=(backend, precision))


KERNELS = {
    **{
        name: Kernel(partial(_backend, name), sparse=True, ours=(name, "bf16")) for name in BACKENDS
    },
    "triton-pointers": Kernel(_pointers, sparse=True, ours=("triton", "bf16")),
    **{name: _eight_bit_kernel(name, "") for name in EIGHT_BITS},
    **{f"triton-{name}": _eight_bit_kernel(name, "triton") for name in EIGHT_BITS},
    "flex": Kernel(_flex, sparse=True),
    "fa4": Kernel(_flash_4, sparse=True, homes=("flash_attn.cute",)),
    "cudnn-frontend": Kernel(
        _cudnn_frontend, sparse=True, homes=("cudnn.block_sparse_attention.api",)
    ),
    "sdpa": Kernel(partial(_sdpa, None)),
    "sdpa-cudnn": Kernel(partial(_sdpa, SDPBackend.CUDNN_ATTENTION)),
    "sdpa-flash": Kernel(partial(_sdpa, SDPBackend.FLASH_ATTENTION)),
    "fa3": Kernel(_flash_3, homes=FA3),
    "xformers": Kernel(_xformers, homes=("xformers.ops",)),
    "sage": Kernel(_sage, homes=("sageattention",), limit=6e-2),
}
DENSE = tuple(name for name, kernel in KERNELS.items() if not kernel.sparse)
CPU_KERNELS = ("gather", "sdpa")
GPU_KERNELS = tuple(name for name in KERNELS if name not in ("reference", *CPU_KERNELS))
