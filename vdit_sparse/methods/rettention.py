"""Re-ttention: a narrow static band, rescaled and completed by what a dense step left behind."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vdit_sparse.bands import MASKS, band_attention, band_density, band_plan, half_width
from vdit_sparse.grid import Grid
from vdit_sparse.kernels.block_mask import BlockMask
from vdit_sparse.kernels.block_sparse import block_sparse_attention
from vdit_sparse.method import Call, Plan, SparseAttention, check_choice, check_number
from vdit_sparse.residual import DTYPES, announce, row_bytes, store


@dataclass(frozen=True, kw_only=True)
class RettentionAttention(SparseAttention):
    """Static band attention that reuses, between periodic dense steps, each row's share of the
    softmax and the contribution of the keys that the band drops.

    Source: Re-ttention, arXiv 2505.22918, Eq. 8-10, and the authors' code. At a cache step

        rho = exp(lse_band - lse_full)      R = out_full - rho * out_band

    are kept for each row and head, and the output is out_full. At the j-th step after it
    (j = 0, 1, ...; skipped steps count) the output is (rho + j * ramp) * out_band + R. R is exactly
    what the dropped keys contributed, so that with the same q, k, v and ramp 0 it is dense again.

    density: kept share of the tokens of a frame, (0, 1]; the authors call it sparsity, and use
        0.03125 and 0.0625. A band is narrower at the ends of a frame; 1 keeps everything.
    mask: "token" is the authors' band |p - p'| <= floor(w / 2), w = floor(density * tokens of a
        frame), between the places p, p' in raster order in any two frames: plain torch, slow, for
        parity; its `plan` is the blocks that cover it. "block" rounds it to blocks, "tile" is a
        disc of tiles of 8 x 16 tokens (8 x 8 at block 64); both keep at least a query block's own
        place in every frame, so narrow bands become wider (rules: `bands.py`). An image is a frame.
    ratio: "lse" as above; "off" takes rho = 1 and no ramp (DiTFastAttn's residual).
    ramp: what rho gains with each sparse step, at least 0; 0.04 in all of the authors' code.
    clamp: keep rho + j * ramp at or below 1; the authors do not, and amplify some rows.
    residual_dtype: how R is kept: "bf16", "fp8" or "int8" (`residual.Stored` has their errors), or
        "same" as the model.
    offload: keep R in the CPU's memory, pinned on CUDA.

    `refresh` says when to cache: at the first sparse step, then as given. The authors warm up for W
    steps and cache at multiples of p = 5: the same where W is a multiple of p, as all theirs are;
    for others their first sparse steps would have no cache. W: PixArt 5 of 20, HunyuanDiT 10 of 50,
    CogVideoX 15 of 50. "each" makes every step dense. We keep R before the output projection and
    not after it, which is linear; rho in fp32; and by branch and step. Text is kept whole.

    Raises ValueError for a field out of range, and MemoryError, before any is taken, where a
    guidance branch would need more memory than the CUDA device has.
    """

    dense_steps: int | float = 0.25
    refresh: str | int | tuple[int | float, ...] = 5
    density: float = 0.125
    mask: str = "block"
    ratio: str = "lse"
    ramp: float = 0.04
    clamp: bool = True
    residual_dtype: str = "bf16"
    offload: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_number("density", self.density, 0, 1)
        check_choice("mask", self.mask, MASKS)
        check_choice("ratio", self.ratio, ("lse", "off"))
        check_choice("residual_dtype", self.residual_dtype, tuple(DTYPES))
        if type(self.ramp) not in (int, float) or not 0 <= self.ramp < math.inf:
            raise ValueError(f"ramp must be a finite number of at least 0, got {self.ramp!r}.")
        for name in ("clamp", "offload"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        if self.mask == "token" and (self.backend is not None or self.precision != "bf16"):
            raise ValueError(
                'mask="token" runs in plain torch: leave backend and precision out, got '
                f"backend={self.backend!r}, precision={self.precision!r}."
            )

    def plan(self, q: Tensor, k: Tensor, call: Call) -> Plan:
        """The plan of this geometry; q and k only say on which device."""
        return band_plan(call.grid, self.mask, self.density, self.block, q.device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Dense attention at a cache step, else what is made of the band and the cache."""
        if self.is_due(call):
            return self._attend_and_cache(q, k, v, call)
        band, _, call.note.density = self._attend_band(q, k, v, call)
        if self.ratio == "lse":
            # A solver may call twice at the step of the cache.
            rho = call.memory["rho"] + max(call.step - call.memory["built"] - 1, 0) * self.ramp
            band = band * (rho.clamp_(max=1) if self.clamp else rho)[..., None]
        return (band + call.memory["residual"].load(q.device)).to(q.dtype)

    def memory(
        self, grid: Grid, heads: int, head_dim: int, layers: int, branches: int = 2, batch: int = 1
    ) -> int:
        """Bytes of rho and R for a run over `layers` layers, dense ones included, with R in the
        CPU's memory or not. branches: guidance branches; 1 where they are rows of a batch.
        "same" is counted as 16 bits."""
        return self._bytes(grid, heads, head_dim, layers, branches * batch, torch.bfloat16)

    def _bytes(self, grid, heads, head_dim, layers, batch, model_dtype) -> int:
        row = row_bytes(DTYPES[self.residual_dtype] or model_dtype, head_dim)
        row += 4 if self.ratio == "lse" else 0
        sparse = max(layers - self.dense_layers - self.last_dense_layers, 0)
        return sparse * batch * heads * grid.tokens * row

    def _attend_band(self, q, k, v, call) -> tuple[Tensor, Tensor, float | Tensor]:
        """out, lse and density of the band alone."""
        if self.mask == "token":
            half = half_width(call.grid, self.density)
            out = band_attention(q, k, v, call.grid, half, call.kv_len)
            return *out, band_density(call.grid, half)
        plan = self.plan(q, k, call)
        out = self.execute(q, k, v, plan, call)
        return *out, plan.mask.kept_share

    def _attend_and_cache(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        if call.layer == self.dense_layers and "built" not in call.memory:
            batch, heads, _, head_dim = q.shape
            need = self._bytes(call.grid, heads, head_dim, call.layers, batch, q.dtype)
            announce(need, q.device, self.offload)
        call.memory.clear()
        everything = BlockMask.full(call.grid.tokens, block=self.block, device=q.device)
        how = {"kv_len": call.kv_len, "backend": self.backend}
        full, full_lse = block_sparse_attention(q, k, v, everything, **how)
        call.note.density = 1.0
        if self.refresh != "each":
            call.note.searched = True
            with call.note.planning(q.device):
                band, lse, _ = self._attend_band(q, k, v, call)
                if self.ratio == "lse":
                    call.memory["rho"] = rho = (lse - full_lse).exp_().clamp_(max=1)
                    band = band * rho[..., None]
                dtype = DTYPES[self.residual_dtype] or q.dtype
                call.memory["residual"] = store(full.float() - band, dtype, self.offload)
            call.memory["built"] = call.step
        return full
