"""Radial's mask against the reference table of the released rule and against brute force."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.methods.radial_cases import ODD_GRIDS, density
from vdit_sparse.grid import Grid
from vdit_sparse.methods.radial import RadialAttention

# Kept blocks and sparsity of the released rule, from an independent emulator; the first row's
# sparsity is the one that a user of the released code printed. 253 and 509 frames are the paper's.
TABLE = {
    "wan-768x1280x69-half": (Grid(18, 48, 80), {"d1": "half"}, 76_798, 0.7366),
    "wan-768x1280x69": (Grid(18, 48, 80), {}, 83_728, 0.7129),
    "wan-768x1280x69-decay1": (Grid(18, 48, 80), {"decay": 1.0}, 125_656, 0.5691),
    "wan-720x960x81-half": (Grid(21, 45, 60), {"d1": "half"}, 51_976, 0.7352),
    "hunyuan-768x1280x117": (
        Grid(30, 48, 80),
        {"decay": 0.95, "sink_frames": 0},
        222_452,
        0.7254,
    ),
    "hunyuan-768x1280x117-text": (
        Grid(30, 48, 80, 256),
        {"decay": 0.95, "sink_frames": 0},
        226_056,
        0.7222,
    ),
    "hunyuan-720x1280x253": (Grid(64, 45, 80), {"decay": 1.0}, 621_078, 0.8083),
    "hunyuan-720x1280x253-no-sink": (
        Grid(64, 45, 80),
        {"decay": 1.0, "sink_frames": 0},
        575_360,
        0.8224,
    ),
    "hunyuan-720x1280x509": (Grid(128, 45, 80), {"decay": 1.0}, 1_506_926, 0.8837),
    "wan22-768x1280x77": (Grid(20, 48, 80), {"decay": 0.8, "block": 64}, 502_720, 0.6509),
    "toy-8": (Grid(8, 16, 16), {"decay": 1.0}, 232, 0.0938),
    "toy-40": (Grid(40, 16, 16), {"decay": 1.0}, 2_612, 0.5919),
    "toy-40-no-sink": (Grid(40, 16, 32), {"decay": 0.5, "sink_frames": 0}, 10_068, 0.6067),
}


def token_band(method, grid, distance):
    """Half-width of the band in tokens, written from the rule; -1 if decimation drops the pair."""
    if distance == 0 or (distance == 1 and method.d1 == "full"):
        return math.inf
    if distance == 1:
        return grid.frame_tokens // 2
    power = 2 ** math.floor(math.log2(grid.frame_tokens))
    length = power / 2 ** math.floor(math.log2(distance))
    if method.decimate and length < 128 and distance % (128 / length) != 0:
        return -1
    return max(method.block, method.decay * length)


@pytest.mark.parametrize("case", TABLE)
def test_released_rule_equals_the_reference_table(case):
    grid, fields, kept, sparsity = TABLE[case]
    keep = RadialAttention(align="released", **fields).keep(grid)
    assert int(keep.sum()) == kept
    assert round(1 - density(keep), 4) == sparsity


@pytest.mark.parametrize("case", TABLE)
def test_straddle_rule_is_close_to_the_reference_table(case):
    grid, fields, kept, _ = TABLE[case]
    keep = RadialAttention(**fields).keep(grid)
    if grid.frame_tokens % fields.get("block", 128) == 0:
        assert int(keep.sum()) == kept
    assert density(keep) == pytest.approx(kept / keep.numel(), abs=0.003)


@pytest.mark.parametrize("d1", ["full", "half"])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("grid", ODD_GRIDS, ids=str)
def test_straddle_keeps_a_block_pair_if_any_of_its_interval_pairs_passes(grid, block, d1):
    method = RadialAttention(block=block, decay=0.6, d1=d1)
    tokens, slack = grid.frame_tokens, 1 - block + math.ceil(block / 6)
    nb = math.ceil(grid.tokens / block)

    def intervals(b):
        frames = {}
        for token in range(b * block, min((b + 1) * block, grid.video)):
            frames.setdefault(token // tokens, []).append(token % tokens)
        return [(frame, min(places), max(places)) for frame, places in frames.items()]

    def passes(query, key):
        (i, first_q, last_q), (j, first_k, last_k) = query, key
        band = token_band(method, grid, abs(i - j))
        if j < method.sink_frames or band == math.inf:
            return True
        gap = max(first_q - last_k, first_k - last_q, 0)
        return band >= 0 and gap <= max(band, block) + slack

    edge = grid.video // block if grid.text else nb
    pieces = [intervals(b) for b in range(nb)]
    for p, row in enumerate(method.keep(grid).tolist()):
        for q, kept in enumerate(row):
            expected = max(p, q) >= edge or any(passes(x, y) for x in pieces[p] for y in pieces[q])
            assert kept == expected, (p, q)


@pytest.mark.parametrize("d1", ["full", "half"])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("grid", [Grid(5, 10, 13), Grid(8, 20, 18), Grid(4, 12, 16)], ids=str)
def test_released_rule_equals_masks_of_single_tokens(grid, block, d1):
    method = RadialAttention(block=block, decay=0.9, d1=d1, align="released")
    tokens, side = grid.frame_tokens, math.ceil(grid.frame_tokens / block)
    nb = math.ceil(grid.tokens / block)
    expected = torch.zeros(nb, nb, dtype=torch.bool)
    expected[grid.video // block :] = expected[:, grid.video // block :] = True
    place = torch.arange(tokens)
    for i in range(grid.frames):
        for j in range(grid.frames):
            band = math.inf if j == 0 else token_band(method, grid, abs(i - j))
            (row, top), (column, left) = (divmod(frame * tokens, block) for frame in (i, j))
            canvas = torch.zeros(side * block + top, side * block + left)
            canvas[top : top + tokens, left : left + tokens] = (
                place - place[:, None]
            ).abs() <= band
            tile = canvas[: side * block, : side * block].view(side, block, side, block)
            share = tile.mean(1)
            dense, covered = (share > 1 / 3).sum(-1), (share > 0).sum(-1)
            expected[row : row + side, column : column + side] |= dense > 0.6 * covered
    assert torch.equal(method.keep(grid), expected)


def band_recall(method, grid, row):
    """Share of the token pairs in the bands of distance >= 2 that the block mask keeps, for the
    queries in one row of pixels of all frames."""
    tokens, block = grid.frame_tokens, method.block
    keep = method.keep(grid)
    before = F.pad(keep.long().cumsum(1), (1, 0)) * block
    keep = F.pad(keep, (0, 1))

    def kept_before(query, key):
        return before[query, key // block] + keep[query, key // block] * (key % block)

    place = torch.arange(row * grid.width, (row + 1) * grid.width)
    kept = total = 0
    for i in range(grid.frames):
        for j in range(method.sink_frames, grid.frames):
            band = token_band(method, grid, abs(i - j))
            if abs(i - j) < 2 or band < 0:
                continue
            query = (i * tokens + place) // block
            first = j * tokens + (place - int(band)).clamp(min=0)
            end = j * tokens + (place + int(band) + 1).clamp(max=tokens)
            kept += int((kept_before(query, end) - kept_before(query, first)).sum())
            total += int((end - first).sum())
    return kept / total


@pytest.mark.parametrize("grid", [Grid(16, 45, 80), Grid(16, 27, 48), Grid(21, 30, 52)], ids=str)
def test_edge_rows_keep_their_band(grid):
    """The released rule loses the band at the first and last rows of each frame of 720x1280x61,
    432x768x61 and 480x832x81, where users saw glitches (woct0rdho/ComfyUI-RadialAttn#10)."""
    rows = (0, grid.height - 1, grid.height // 2)
    top, bottom, middle = (band_recall(RadialAttention(decay=1.0), grid, row) for row in rows)
    assert min(top, bottom) >= middle - 0.01
    released = RadialAttention(decay=1.0, align="released")
    top, bottom, middle = (band_recall(released, grid, row) for row in rows)
    assert max(top, bottom) < middle - 0.03
