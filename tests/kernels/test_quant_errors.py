"""Errors of 8-bit attention on random data and on q, k, v of the bundled model, with and without
channels ten times as large, for every backend that the machine has."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, pad

from tests.kernels.test_block_sparse_int8 import attend, error_of, in_float64
from vdit_sparse.kernels.block_mask import BlockMask
from vdit_sparse.pipelines.load import load_pipeline
from vdit_sparse.pipelines.wan_attention import query_key_value

pytest_plugins = ["tests.kernels.float8"]
pytestmark = pytest.mark.usefixtures("float8")
CHANNEL, TIMES = 3, 10  # of an outlier
BARS = {"int8_bf16": 1.6e-2, "int8_fp8": 4.5e-2}
OUTLIERS = {"none": "", "of q": "q", "of k": "k", "of q, k and v": "qkv"}


def from_the_model() -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v `[1, 3, 336, 64]` after norm and RoPE, fp32: one head each of the first, a middle
    and the last layer of the bundled model, in the second of two steps."""
    pipe = load_pipeline(device="cpu", dtype=torch.float32)
    blocks, seen = pipe.transformer.blocks, []

    def see(attn, arguments, head):
        states, _, _, rotary = arguments
        q_k_v = query_key_value(attn, states, rotary)
        seen.append([x[:, :, head : head + 1].transpose(1, 2) for x in q_k_v])

    for head, layer in enumerate((0, len(blocks) // 2, -1)):
        blocks[layer].attn1.register_forward_pre_hook(partial(see, head=head))
    size = {"height": 128, "width": 224, "num_frames": 9, "num_inference_steps": 2}
    seed = torch.Generator().manual_seed(0)
    with torch.no_grad():
        pipe("a red ball", **size, guidance_scale=1.0, output_type="latent", generator=seed)
    return tuple(torch.cat(heads, 1) for heads in zip(*seen[-3:], strict=True))


@pytest.fixture(scope="session")
def of_the_model() -> tuple[Tensor, Tensor, Tensor]:
    return from_the_model()


def inputs(source: str, outlier: str, device, request):
    """`prepared` q, k, v of the model or random ones of that D; fp16 in Triton's interpreter."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    if source == "the model":
        tensors = request.getfixturevalue("of_the_model")
    else:
        tensors = torch.randn(3, 1, 4, 200, int(source.split()[-1]))
    return prepared(tensors, outlier, 64 if source == "random 64" else 128, device, dtype)


def prepared(tensors, outlier: str, blocks: int, device, dtype: torch.dtype):
    """q, k and v, one channel of those named in `outlier` ten times as large, and a mask with a
    ragged last block."""
    tensors = [x.to(device, dtype, copy=True) for x in tensors]
    for name, x in zip("qkv", tensors, strict=True):
        if name in outlier:
            x[..., CHANNEL] *= TIMES
    heads, count = tensors[0].shape[1], -(-tensors[0].shape[2] // blocks)
    # torch's own numbers may have been drawn from, by the model's loading.
    drawn = torch.rand(heads, count, count, generator=torch.Generator().manual_seed(0))
    keep = (drawn < 0.6) | torch.eye(count, dtype=torch.bool)
    return *tensors, BlockMask.from_keep(keep, blocks).to(device)


def rotation(channels: int) -> Tensor:
    """Hadamard's matrix and the Rudin-Shapiro sequence, by their recursions."""
    matrix = signs = partner = torch.ones(1, dtype=torch.float64)
    matrix = matrix[None]
    while len(matrix) < channels:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        signs, partner = torch.cat([signs, partner]), torch.cat([signs, -partner])
    return signs[:, None] * matrix / channels**0.5


def emulated(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, precision: str) -> Tensor:
    """Attention in float64 with the roundings of `precision` in plain torch."""
    S, D = q.shape[2:]
    turn = torch.block_diag(*[rotation(64)] * (D // 64)).to(q.device)
    weights_in, v = q.dtype, v.double()
    q, k = q.double(), k.double()
    some = torch.arange(S) % 64 // 8 == torch.arange(S) // 64 % 8
    k = k - k[:, :, some].mean(2, keepdim=True)
    strength = [x[:, :, some].square().mean(2, keepdim=True) for x in (q, k)]
    balance = 2 ** ((strength[1] / strength[0]).log2() / 4).round().clamp(-3, 3)
    q, k = (q * balance) @ turn, (k / balance) @ turn
    q, k = (in_int8(x, block) for x, block in ((q, mask.block_q), (k, mask.block_k)))
    scores = (q @ k.mT * D**-0.5).masked_fill(~mask.token_mask(S, S), -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    total, top = weights.sum(-1, keepdim=True), 1.0
    if precision == "int8_fp8":
        weights_in, top = torch.float8_e4m3fn, 448.0
        step = v.abs().amax(2, keepdim=True) / top
        v = (v / step).float().to(weights_in).double() * step
    weights = (weights * top).float().to(weights_in).double() / top
    return weights @ v / total


def in_int8(x: Tensor, block: int) -> Tensor:
    """x rounded to 255 levels of each block of tokens and head."""
    blocks = pad(x, (0, 0, 0, -x.shape[2] % block)).unflatten(2, (-1, block))
    step = blocks.abs().amax((3, 4), keepdim=True) / 127
    return ((blocks / step).round() * step).flatten(2, 3)[:, :, : x.shape[2]]


@pytest.mark.parametrize("backend", ["reference", "triton", "hopper"])
@pytest.mark.parametrize("precision", BARS)
@pytest.mark.parametrize("outlier", OUTLIERS.values(), ids=OUTLIERS)
@pytest.mark.parametrize("source", ["the model", "random 64", "random 128"])
def test_error_bars(source, outlier, precision, backend, device, request):
    q, k, v, mask = inputs(source, outlier, device, request)
    out, _ = attend(backend, q, k, v, mask, precision)
    exact = in_float64(q, k, v, mask)[0]
    error = error_of(out, exact)
    assert error <= BARS[precision]
    assert cosine_similarity(out.double().flatten(), exact.flatten(), 0) >= 0.998
    # The output is rounded too.
    rounded = emulated(q, k, v, mask, precision).to(q.dtype)
    assert error <= 1.1 * error_of(rounded, exact)
