"""Selection: exactly the blocks that sorting by hand chooses, as ascending lists."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vdit_sparse.kernels.block_mask import BlockMask
from vdit_sparse.kernels.select import ascending_lists, threshold_blocks, top_blocks

ROOT = Path(__file__).parents[2]
INF, NAN = float("inf"), float("nan")
# Zeros of both signs, subnormals, neighbours in fp32, and what is not a number.
HARD = [0.0, -0.0, 1e-45, -1e-45, 1e-40, 1.0, 1.0000001, -1.0, 3e38, -3e38, -INF, NAN]
BACKENDS = ("triton", "reference")


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return request.param


def hard_scores(*shape: int) -> torch.Tensor:
    return torch.tensor(HARD)[torch.randint(len(HARD), shape)]


def tied_scores(*shape: int) -> torch.Tensor:
    return torch.randint(-2, 3, shape).float()


SCORES = {"normal": torch.randn, "tied": tied_scores, "hard": hard_scores, "equal": torch.zeros}


def chosen_by_hand(scores: list[float], count: int, candidates: list[bool]) -> list[bool]:
    """The specification on one list: highest first, then lowest index."""
    ranked = [-INF if score != score else score for score in scores]
    order = sorted(
        (i for i, candidate in enumerate(candidates) if candidate), key=lambda i: (-ranked[i], i)
    )
    kept = set(order[: max(count, 0)])
    return [i in kept for i in range(len(scores))]


def top_by_hand(score, count, per="row", always=None, valid=None) -> torch.Tensor:
    B, H, nq, nk = score.shape
    candidate = torch.ones(nk, dtype=torch.bool) if valid is None else valid > 0
    keep = torch.zeros(score.shape, dtype=torch.bool)
    count = torch.as_tensor(count)
    for b in range(B):
        for h in range(H):
            if per == "head":
                k = int(count.expand(B, H)[b, h])
                flat = chosen_by_hand(score[b, h].flatten().tolist(), k, candidate.tolist() * nq)
                keep[b, h] = torch.tensor(flat).view(nq, nk)
                continue
            counts = (count if count.ndim == 3 else count.expand(B, H)[..., None]).expand(B, H, nq)
            for q in range(nq):
                row = score[b, h, q].tolist()
                keep[b, h, q] = torch.tensor(
                    chosen_by_hand(row, int(counts[b, h, q]), candidate.tolist())
                )
    if always is not None:
        keep = keep | always
    return keep & candidate


def check(mask: BlockMask, keep: torch.Tensor) -> None:
    """The mask is `keep`, and its lists are as `BlockMask` wants them."""
    assert torch.equal(mask.keep().cpu(), keep)
    assert torch.equal(mask.cnt.cpu(), keep.sum(-1, dtype=torch.int32))
    assert 1 <= mask.idx.shape[-1] <= mask.nk
    for row, listed, n in zip(
        keep.flatten(0, 2),
        mask.idx.flatten(0, 2).tolist(),
        mask.cnt.flatten().tolist(),
        strict=True,
    ):
        if n < mask.nk:
            assert listed[:n] == row.nonzero()[:, 0].tolist()


@pytest.mark.parametrize("per", ["row", "head"])
@pytest.mark.parametrize("kind", SCORES)
def test_exactly_the_highest(kind, per, backend, device):
    score = SCORES[kind](1, 2, 2, 37)
    count = 11 if per == "row" else 30
    mask = top_blocks(score.to(device), count, 64, per=per, backend=backend)
    check(mask, top_by_hand(score, count, per))


@pytest.mark.parametrize("per", ["row", "head"])
@pytest.mark.parametrize("count", [-3, 0, 1, 6, 12, 10**12])
def test_counts_are_clamped(count, per, backend, device):
    score = tied_scores(1, 1, 2, 6)
    mask = top_blocks(score.to(device), count, 128, per=per, backend=backend)
    check(mask, top_by_hand(score, count, per))
    most = 6 if per == "row" else 12
    assert int(mask.cnt.max() if per == "row" else mask.cnt.sum()) == min(max(count, 0), most)


@pytest.mark.parametrize("nk", [1, 33, 1100])
@pytest.mark.parametrize("per", ["row", "head"])
def test_widths(nk, per, backend, device):
    score = tied_scores(1, 1, 2, nk)
    count = nk // 3 if per == "row" else nk
    mask = top_blocks(score.to(device), count, 64, per=per, backend=backend)
    check(mask, top_by_hand(score, count, per))


def test_maps_of_many_rows(backend, device):
    # More rows than one program counts; on a GPU also more than one load of the earlier rows.
    rows = 300 if device.type == "cuda" else 20
    score = tied_scores(1, 1, rows, 3)
    score[0, 0, rows - 2 :] = 9
    mask = top_blocks(score.to(device), 2 * rows, 64, per="head", backend=backend)
    check(mask, top_by_hand(score, 2 * rows, "head"))


@pytest.mark.parametrize("per", ["row", "head"])
def test_more_blocks_keep_those_of_fewer(per, backend, device):
    score = hard_scores(1, 1, 2, 6).to(device)
    before = torch.zeros(score.shape, dtype=torch.bool, device=device)
    for count in range(0, 7 if per == "row" else 13, 2 if per == "row" else 4):
        keep = top_blocks(score, count, 64, per=per, backend=backend).keep()
        assert (keep | ~before).all()
        assert keep.sum() == count * (2 if per == "row" else 1)
        before = keep


@pytest.mark.parametrize(
    ("per", "shape", "dtype"),
    [
        ("row", (2,), torch.int32),
        ("row", (2, 1), torch.uint8),
        ("row", (2, 2, 2), torch.int32),
        ("row", (1, 1, 2), torch.int64),
        ("head", (2, 1), torch.uint8),
        ("head", (2, 2), torch.int64),
    ],
)
def test_counts_of_heads_and_rows(per, shape, dtype, backend, device):
    score = tied_scores(2, 2, 2, 5)
    count = torch.randint(0, 7 if per == "row" else 12, shape, dtype=dtype)
    mask = top_blocks(score.to(device), count.to(device), 64, per=per, backend=backend)
    check(mask, top_by_hand(score, count, per))


@pytest.mark.parametrize("per", ["row", "head"])
@pytest.mark.parametrize("shape", [(2, 5), (2, 1), (2, 1, 5)])
def test_always_is_beyond_the_budget(shape, per, backend, device):
    score = tied_scores(1, 2, 2, 5)
    always = torch.rand(shape) < 0.4
    mask = top_blocks(score.to(device), 2, 64, per=per, always=always.to(device), backend=backend)
    check(mask, top_by_hand(score, 2, per, always))


def test_a_forced_block_that_is_chosen_counts_once(backend, device):
    score = torch.tensor([[[[3.0, 2.0, 1.0, 0.0]]]], device=device)
    always = torch.tensor([True, False, False, True], device=device)
    mask = top_blocks(score, 2, 64, always=always, backend=backend)
    assert mask.idx[0, 0, 0].tolist() == [0, 1, 3]


@pytest.mark.parametrize("per", ["row", "head"])
@pytest.mark.parametrize("count", [1, 100])
def test_blocks_without_real_tokens_are_never_listed(count, per, backend, device):
    score = hard_scores(1, 1, 2, 6)
    score[..., 0] = 5  # the highest, and not to be had
    score[0, 0, 0, 1:] = -INF  # as low as it gets, and to be had
    valid = torch.tensor([0, 64, 3, 0, 64, 1], dtype=torch.int32)
    always = torch.eye(2, 6, dtype=torch.bool)
    for forced in (None, always):
        there = None if forced is None else forced.to(device)
        mask = top_blocks(
            score.to(device), count, 64, per=per, always=there, valid=valid.to(device),
            backend=backend,
        )  # fmt: skip
        check(mask, top_by_hand(score, count, per, forced, valid))
        assert torch.equal(mask.valid.cpu(), valid)
        assert not mask.keep()[..., [0, 3]].any()


def test_without_any_real_token_nothing_is_kept(backend, device):
    valid = torch.zeros(5, dtype=torch.int32, device=device)
    score = torch.randn(1, 1, 2, 5, device=device)
    for per in ("row", "head"):
        mask = top_blocks(score, 3, 64, per=per, valid=valid, backend=backend)
        assert mask.cnt.sum() == 0


@pytest.mark.parametrize("leading", [(1, 1), (1, 2), (2, 1)])
def test_shared_maps_stay_shared(leading, backend, device):
    score = tied_scores(*leading, 2, 6)
    for per in ("row", "head"):
        mask = top_blocks(score.to(device), 3, 64, per=per, backend=backend)
        assert mask.idx.shape[:2] == leading
        check(mask, top_by_hand(score, 3, per))


@pytest.mark.parametrize("per", ["row", "head"])
def test_any_strides(per, backend, device):
    transposed = tied_scores(1, 6, 2, 2).to(device).transpose(1, 3)
    expanded = tied_scores(1, 1, 2, 6).to(device).expand(-1, 2, -1, -1)
    padded = tied_scores(2, 1, 2, 9).to(device)[..., 2:8]
    for score in (transposed, expanded, padded):
        mask = top_blocks(score, 3, 64, per=per, backend=backend)
        check(mask, top_by_hand(score.cpu(), 3, per))


def test_both_ways_of_counting_keep_as_many(backend, device):
    score = torch.randn(1, 2, 3, 8, device=device)
    rows = top_blocks(score, 3, 64, backend=backend)
    heads = top_blocks(score, 9, 64, per="head", backend=backend)
    assert torch.equal(rows.cnt.sum(-1), heads.cnt.sum(-1))
    # The best of the whole map cannot be worse than the best of each row.
    kept = [torch.where(mask.keep(), score, 0).double().sum() for mask in (rows, heads)]
    assert kept[1] >= kept[0]


@pytest.mark.parametrize("kind", SCORES)
def test_scores_of_at_least_the_threshold(kind, backend, device):
    score = SCORES[kind](1, 1, 2, 33)
    ranked = torch.where(score.isnan(), -INF, score)
    for threshold in (0.0, -0.0, 1e-45, 1.0000001, -1.0, INF, -INF):
        mask = threshold_blocks(score.to(device), threshold, 64, backend=backend)
        check(mask, ranked >= threshold)


@pytest.mark.parametrize("shape", [(), (3,), (2, 1), (2, 3)])
def test_thresholds_of_heads(shape, backend, device):
    score = torch.randn(2, 3, 2, 6)
    valid = torch.tensor([64, 0, 3, 64, 64, 1], dtype=torch.int32)
    always = torch.eye(2, 6, dtype=torch.bool)
    threshold = torch.randn(shape, dtype=torch.float64).float()
    mask = threshold_blocks(
        score.to(device), threshold.double().to(device), (128, 64), always=always.to(device),
        valid=valid.to(device), backend=backend,
    )  # fmt: skip
    kept = (score >= threshold.expand(2, 3)[..., None, None]) | always
    check(mask, kept & (valid > 0))
    assert (mask.block_q, mask.block_k) == (128, 64)


def test_nothing_reaches_a_threshold_that_is_not_a_number(backend, device):
    threshold = torch.tensor([0.0, NAN], device=device)
    mask = threshold_blocks(torch.ones(1, 2, 3, 4, device=device), threshold, 64, backend=backend)
    assert mask.cnt[0].tolist() == [[4, 4, 4], [0, 0, 0]]


@pytest.mark.parametrize("cap", [1, 3, 7])
def test_lists_of_a_given_width(cap, backend, device):
    keep = torch.rand(2, 2, 5, 7) < 0.5
    keep[0, 0, 0] = True
    lists = ascending_lists(keep.to(device), cap, backend=backend)
    assert lists.dtype == torch.int32 and lists.shape == (2, 2, 5, cap)
    assert lists.min() >= 0 and lists.max() < 7
    for row, listed in zip(keep.flatten(0, 2), lists.flatten(0, 2).tolist(), strict=True):
        columns = row.nonzero()[:, 0].tolist()[:cap]
        assert listed[: len(columns)] == columns


def test_lists_of_a_view(backend, device):
    keep = (torch.rand(1, 5, 4, 3, device=device) < 0.5).transpose(1, 3)
    cnt = keep.sum(-1, dtype=torch.int32)
    mask = BlockMask(ascending_lists(keep, 5, backend=backend), cnt, 5)
    assert torch.equal(mask.keep(), keep)


def test_the_width_is_known_beforehand_for_an_int_a_row(backend, device):
    score = torch.randn(1, 1, 2, 10, device=device)
    assert top_blocks(score, 4, 64, backend=backend).idx.shape[-1] == 4
    assert top_blocks(score, 0, 64, backend=backend).idx.shape[-1] == 1
    full = top_blocks(score, 10, 64, backend=backend)
    assert full.idx.shape[-1] == 1 and full.density() == 1


@pytest.mark.gpu
def test_an_int_a_row_does_not_wait_for_the_gpu():
    score = torch.randn(1, 2, 30, 100, device="cuda")
    top_blocks(score, 4, 64)
    torch.cuda.set_sync_debug_mode("error")
    try:
        mask = top_blocks(score, 4, 64)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check(mask, top_by_hand(score.cpu(), 4))


@pytest.mark.gpu
@pytest.mark.parametrize("per", ["row", "head"])
@pytest.mark.parametrize("kind", ["normal", "tied"])
def test_long_videos_on_the_gpu(kind, per):
    score = SCORES[kind](1, 8, 1200, 1200).cuda()
    count = torch.arange(8, device="cuda") * (20 if per == "row" else 24_000)
    masks = [top_blocks(score, count, 64, per=per, backend=name) for name in BACKENDS]
    assert torch.equal(masks[0].keep(), masks[1].keep())


def test_the_default_is_what_the_device_runs_best(device):
    score = tied_scores(1, 2, 4, 6)
    check(top_blocks(score.to(device), 3, 64), top_by_hand(score, 3))
    wide = torch.zeros(1, 1, 1, 8193, device=device)
    assert top_blocks(wide, 3, 64).idx[0, 0, 0].tolist() == [0, 1, 2]


SCORE = torch.zeros(1, 2, 3, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: top_blocks(SCORE[0], 1, 64), ValueError, r"\[B|1, H|1, nq, nk\].*got \(2, 3, 4\)"),
        (lambda: top_blocks(SCORE[..., :0], 1, 64), ValueError, "not empty"),
        (lambda: top_blocks(SCORE.double(), 1, 64), TypeError, "fp32, got torch.float64"),
        (lambda: top_blocks(SCORE, 1, 64, per="map"), ValueError, "per must be one of"),
        (lambda: top_blocks(SCORE, 1.5, 64), TypeError, "count must be an int .* got float"),
        (lambda: top_blocks(SCORE, torch.ones(2), 64), TypeError, "integer tensor, got torch.fl"),
        (lambda: top_blocks(SCORE, torch.ones(3).int(), 64), ValueError, r"to \[1, 2\].*expand"),
        (
            lambda: top_blocks(SCORE, torch.ones(1, 2, 3).int(), 64, per="head"),
            ValueError,
            r"count must broadcast to \[1, 2\], got \(1, 2, 3\)",
        ),
        (lambda: top_blocks(SCORE, 1, 64, always=SCORE), TypeError, "always must be bool"),
        (
            lambda: top_blocks(SCORE, 1, 64, always=torch.ones(5, 1, 1, 1).bool()),
            ValueError,
            r"always must broadcast to \[1, 2, 3, 4\]",
        ),
        (lambda: top_blocks(SCORE, 1, 64, valid=torch.ones(4)), ValueError, r"valid.*int32 \[4\]"),
        (lambda: top_blocks(SCORE, 1, 32), ValueError, "block_q must be one of"),
        (lambda: top_blocks(SCORE, 1, 64, backend="cuda"), ValueError, "backend must be one of"),
        (
            lambda: top_blocks(torch.zeros(1, 1, 1, 8193), 1, 64, backend="triton"),
            ValueError,
            "'triton' does not take this call",
        ),
        (lambda: threshold_blocks(SCORE, NAN, 64), ValueError, "threshold must be a number"),
        (lambda: threshold_blocks(SCORE, torch.ones(2).int(), 64), TypeError, "got torch.int32"),
        (lambda: threshold_blocks(SCORE, torch.ones(3), 64), ValueError, "threshold must broad"),
        (
            lambda: top_blocks(SCORE, torch.ones(2, device="meta").int(), 64),
            ValueError,
            "count must be on cpu like score, got meta",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import vdit_sparse.kernels.select.triton as select

WIDTH, ARCH = 1024, sys.argv[1]
target = GPUTarget("cuda", int(ARCH[3:]), 32) if ARCH[:3] == "sm_" else GPUTarget("hip", ARCH, 64)
found = []
for name in ("top_of_rows", "rows_above", "count_digits", "count_equal", "top_of_maps",
             "list_columns"):
    kernel = getattr(select, name)
    constants = {"BLOCK": WIDTH, "DIGIT": 2, "ROWS": 16}
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    types = {"keep_ptr": "*u8", "always_ptr": "*u8"}
    signature = {
        arg: types.get(arg, "*i32" if arg.endswith("_ptr") else "i32") for arg in kernel.arg_names
    }
    signature |= dict.fromkeys(constants, "constexpr")
    places = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
    source = ASTSource(kernel, signature, places, {})
    warps = 4 if name == "count_digits" else 1
    compiled = triton.compile(source, target, {"num_warps": warps})
    found.append([name, compiled.metadata.shared])
print(json.dumps(found))
"""


@pytest.mark.parametrize("arch", ["sm_90", pytest.param("gfx942", marks=pytest.mark.slow)])
def test_every_kernel_compiles_without_a_gpu(arch):
    command = ["env", "-u", "TRITON_INTERPRET", f"PYTHONPATH={ROOT}", sys.executable, "-c", COMPILE]
    done = subprocess.run([*command, arch], capture_output=True, text=True)
    if done.returncode:
        pytest.fail(done.stderr[-3000:])
    rows = json.loads(done.stdout.splitlines()[-1])
    assert len(rows) == 6
    assert all(shared <= 32 * 1024 for _, shared in rows), rows
