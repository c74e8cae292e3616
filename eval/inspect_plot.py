"""Pictures of an inspection: what heads visit beside the exact mass, recall, density over steps."""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from vdit_sparse.eval.inspect import Inspection, Look
from vdit_sparse.eval.inspect_maps import HeadMap

INK, FAINT, RULE, PAPER = (28, 31, 36), (98, 105, 115), (217, 220, 225), (255, 255, 255)
# From least to most; dark to light in even steps of lightness, so that it prints in grey too.
SCALE = (
    (18, 20, 48),
    (46, 62, 122),
    (40, 116, 142),
    (62, 168, 122),
    (178, 206, 74),
    (255, 250, 190),
)
# Mass, as a multiple of what a block would have if all had the same: the ends of the scale.
LEAST, MOST = 1 / 32, 32
PANEL, GAP, MARGIN, BAR = 172, 14, 24, 220
TITLE, TEXT, FINE = 17, 14, 12
# Pixels of the line below a title, and of the colour bar beside it.
WIDEST_LEGEND = 1000


def maps_picture(found: Inspection, step: int) -> Image.Image | None:
    """The chosen heads of a step: of each the visited blocks, the exact mass, and the mass that the
    head misses, queries from top to bottom, in the order of the sequence. None without maps."""
    looks = [look for look in found.looks if look.step == step and look.maps]
    cells = [(look, head) for look in looks for head in look.maps]
    if not cells:
        return None
    panels = max(len(_panels(look.maps[head])) for look, head in cells)
    width, height = panels * (PANEL + GAP), PANEL + 52
    across = 2 if panels <= 3 and len(cells) > 1 else 1
    down = math.ceil(len(cells) / across)
    wide = max(2 * MARGIN + across * (width + GAP), WIDEST_LEGEND)
    image, draw = _canvas((wide, 2 * MARGIN + 62 + down * height))
    _write(draw, (MARGIN, MARGIN), f"Step {step} of {found.steps}", TITLE)
    _write(draw, (MARGIN, MARGIN + 24), _legend(looks[0]), FINE, FAINT)
    place = (image.width - MARGIN - BAR, MARGIN)
    _bar(draw, place, ("visited 0", "", "1"))
    _bar(
        draw,
        (place[0], place[1] + 17),
        (f"mass 1/{1 / LEAST:g} x", "even", f"{MOST} x"),
        colours=False,
    )
    for number, (look, head) in enumerate(cells):
        row, column = divmod(number, across)
        corner = (MARGIN + column * (width + GAP), MARGIN + 62 + row * height)
        _cell(image, draw, corner, look, head)
    return image


def recall_picture(found: Inspection) -> Image.Image:
    """Recall of each head (column) and layer (row), a map for each measured step. Numbers stand in
    it where they fit; the colours go from the lowest recall, rounded down to a tenth, to 1."""
    table = found.table("recall")
    known = table[~table.isnan()]
    low = min(math.floor(float(known.min()) * 10) / 10, 0.9) if len(known) else 0.0
    wide = max(8, min(42, 640 // found.heads))
    high = max(8, min(24, 640 // found.layers))
    width, height = 40 + wide * found.heads, 52 + high * found.layers
    across = max(1, min(len(table), 1240 // (width + GAP)))
    down = math.ceil(len(table) / across)
    size = (2 * MARGIN + max(across * (width + GAP), 620), 2 * MARGIN + 58 + down * (height + GAP))
    image, draw = _canvas(size)
    _write(draw, (MARGIN, MARGIN), "Recall: softmax weight in the visited blocks", TITLE)
    _write(draw, (MARGIN, MARGIN + 24), "rows: layers; columns: heads", FINE, FAINT)
    names = (f"{low:.1f}", "", "1.0")
    _bar(draw, (image.width - MARGIN - BAR, MARGIN), names)
    for number, (step, values) in enumerate(zip(found.measured, table, strict=True)):
        row, column = divmod(number, across)
        corner = (MARGIN + column * (width + GAP), MARGIN + 58 + row * (height + GAP))
        _heat(draw, corner, f"step {step}", values, low, (wide, high))
    return image


def density_picture(found: Inspection) -> Image.Image:
    """Mean density of all self-attention of each step as bars, and mean recall of the measured
    steps as dots."""
    wide, high = max(6, min(100, 600 // found.steps)), 220
    image, draw = _canvas((2 * MARGIN + 44 + max(wide * found.steps, 400), high + 130))
    _write(draw, (MARGIN, MARGIN), "Density of each step, all layers and heads", TITLE)
    _write(draw, (MARGIN, MARGIN + 24), "dots: mean recall where it was measured", FINE, FAINT)
    left, bottom = MARGIN + 44, high + 84
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = bottom - share * high
        draw.line((left, y, image.width - MARGIN, y), fill=RULE)
        _write(draw, (left - 8, y), f"{share:g}", FINE, FAINT, "rm")
    for step in range(found.steps):
        x = left + step * wide
        value = found.densities.get(step)
        if value is not None:
            draw.rectangle((x + 2, bottom - value * high, x + wide - 2, bottom), fill=_colour(0.35))
        if step % math.ceil(26 / wide) == 0:
            _write(draw, (x + wide / 2, bottom + 12), str(step), FINE, FAINT, "mm")
    for step, values in zip(found.measured, found.table("recall"), strict=True):
        x, y = left + (step + 0.5) * wide, bottom - float(values.nanmean()) * high
        draw.ellipse((x - 5, y - 5, x + 5, y + 5), fill=(213, 94, 0), outline=PAPER)
    _write(draw, ((left + image.width) / 2, bottom + 32), "denoising step", TEXT, INK, "mm")
    return image


def _legend(look: Look) -> str:
    rows, columns = next(iter(look.maps.values())).plan.blocks
    text = " or the text" if look.grid.text else ""
    return (
        f"blocks of {rows} queries (down) x {columns} keys (across); mass against an even spread; "
        f"marks at the edges: where a frame{text} begins"
    )


def _cell(image: Image.Image, draw: ImageDraw.ImageDraw, corner, look: Look, head: int) -> None:
    left, top = corner
    said = f"layer {look.layer}, head {head}: density {look.density[head]:.3f}, "
    said += f"recall {look.recall[head]:.3f} (best {look.best[head]:.3f})"
    _write(draw, (left, top), said, TEXT)
    map_ = look.maps[head]
    for number, (name, values, raster) in enumerate(_panels(map_)):
        at = (left + number * (PANEL + GAP), top + 40)
        note = f"{name}: all, by {look.why}" if look.why and name == "visited" else name
        _write(draw, (at[0], at[1] - 19), note, FINE, FAINT)
        image.paste(_picture(values), at)
        if raster:
            _marks(draw, at, look, map_)


def _panels(map_: HeadMap) -> list[tuple[str, Tensor, bool]]:
    """Names, values 0 to 1 `[nq, nk]`, and whether they are in the order of the sequence; a plan
    with an order of its own is shown in that first."""
    keep, mass = map_.plan.keep.float(), map_.mass.float()
    if map_.ordered is None:
        missed = _shade(mass * (1 - keep))
        return [("visited", keep, True), ("mass", _shade(mass), True), ("missed", missed, True)]
    own = map_.ordered.float()
    return [
        ("visited, plan order", keep, False),
        ("mass, plan order", _shade(own), False),
        ("missed, plan order", _shade(own * (1 - keep)), False),
        ("visited share, sequence order", map_.plan.raster_share(), True),
        ("mass, sequence order", _shade(mass), True),
    ]


def _shade(mass: Tensor) -> Tensor:
    """The logarithm of mass, as a multiple of the even mass, from `LEAST` to `MOST` as 0 to 1."""
    low, high = math.log(LEAST), math.log(MOST)
    return ((_fitted(mass) * mass.shape[1]).clamp(LEAST, MOST).log() - low) / (high - low)


def _fitted(values: Tensor) -> Tensor:
    """Means over parts of a map of more blocks than a panel has pixels."""
    size = [min(x, PANEL) for x in values.shape]
    return adaptive_avg_pool2d(values[None], size)[0]


def _picture(values: Tensor) -> Image.Image:
    """Values 0 to 1 as a panel."""
    anchors = torch.tensor(SCALE, dtype=torch.float32)
    at = _fitted(values).clamp(0, 1) * (len(SCALE) - 1)
    below = at.long().clamp(max=len(SCALE) - 2)
    colours = torch.lerp(anchors[below], anchors[below + 1], (at - below)[..., None])
    picture = Image.fromarray(colours.round().to(torch.uint8).numpy())
    return picture.resize((PANEL, PANEL), Image.Resampling.NEAREST)


def _marks(draw: ImageDraw.ImageDraw, corner, look: Look, map_: HeadMap) -> None:
    """Short lines outside of a panel where frames and the text begin."""
    grid, (left, top) = look.grid, corner
    tokens = [frame * grid.frame_tokens for frame in range(1, grid.frames)]
    tokens += [grid.video] if grid.text else []
    for token in tokens:
        rows, columns = (
            round(token / size / count * PANEL)
            for size, count in zip(map_.plan.blocks, map_.mass.shape, strict=True)
        )
        draw.line((left - 4, top + rows, left - 2, top + rows), fill=FAINT)
        draw.line((left + columns, top - 4, left + columns, top - 2), fill=FAINT)


def _heat(draw, corner, title: str, values: Tensor, low: float, size: tuple[int, int]) -> None:
    """values `[layers, heads]`; size: width and height of a cell."""
    (left, top), (wide, high) = corner, size
    _write(draw, (left + 28, top), title, TEXT)
    for head in range(0, values.shape[1], math.ceil(22 / wide)):
        _write(draw, (left + 28 + (head + 0.5) * wide, top + 32), str(head), FINE, FAINT, "mm")
    for layer, row in enumerate(values.tolist()):
        y = top + 42 + layer * high
        if layer % math.ceil(14 / high) == 0:
            _write(draw, (left + 22, y + high / 2), str(layer), FINE, FAINT, "rm")
        for head, value in enumerate(row):
            x = left + 28 + head * wide
            shade = None if math.isnan(value) else (value - low) / (1 - low)
            fill = RULE if shade is None else _colour(shade)
            draw.rectangle((x, y, x + wide - 2, y + high - 2), fill=fill)
            if shade is not None and wide >= 34 and high >= 16:
                ink = INK if shade > 0.55 else PAPER
                _write(draw, (x + wide / 2 - 1, y + high / 2 - 1), f"{value:.2f}", FINE, ink, "mm")


def _bar(draw, corner, names: Sequence[str], colours: bool = True) -> None:
    """The colours from least to most, with three names below; or the names alone."""
    left, top = corner
    for x in range(BAR if colours else 0):
        draw.line((left + x, top, left + x, top + 10), fill=_colour(x / (BAR - 1)))
    for name, x, anchor in zip(names, (0, BAR / 2, BAR), ("ls", "ms", "rs"), strict=True):
        if name:
            _write(draw, (left + x, top + 24), name, FINE, FAINT, anchor)


def _colour(share: float) -> tuple[int, int, int]:
    at = min(max(share, 0.0), 1.0) * (len(SCALE) - 1)
    below = min(int(at), len(SCALE) - 2)
    pairs = zip(SCALE[below], SCALE[below + 1], strict=True)
    return tuple(round(low + (at - below) * (high - low)) for low, high in pairs)


def _canvas(size: tuple[int, int]) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", size, PAPER)
    return image, ImageDraw.Draw(image)


def _write(draw, place, text: str, size: int, colour=INK, anchor: str = "la") -> None:
    draw.text(place, text, fill=colour, font=_font(size), anchor=anchor)


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)
