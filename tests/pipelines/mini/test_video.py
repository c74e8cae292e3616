"""The procedural videos: deterministic, of the right shape, and showing what the captions say."""

import numpy as np
import pytest
import torch

from vdit_sparse.pipelines.mini.training.captions import Item, Spec
from vdit_sparse.pipelines.mini.training.palette import hsv_to_rgb, lattice, rgb_to_hsv
from vdit_sparse.pipelines.mini.training.sprites import texture
from vdit_sparse.pipelines.mini.training.tracks import tracks
from vdit_sparse.pipelines.mini.training.video import ProceduralVideo, contact_sheet
from vdit_sparse.pipelines.mini.training.vocabulary import (
    CAMERAS,
    COLOURS,
    MOTIONS,
    PLACES,
    SHAPES,
    TINTABLE,
    things,
)

HEIGHT, WIDTH = 64, 112


@pytest.fixture
def generator(device):
    return ProceduralVideo(device, HEIGHT, WIDTH, frames=5)


def difference(generator: ProceduralVideo, spec: Spec) -> torch.Tensor:
    """What the things of a clip change in every frame, [T, H, W] on the CPU."""
    bare = Spec(spec.place, (), spec.time, spec.weather, spec.camera, spec.seed)
    clip, empty = generator.render([spec, bare]).cpu()
    return (clip - empty).abs().sum(0)


def centroids(weights: torch.Tensor) -> torch.Tensor:
    """Centres of [T, H, W] in pixels, [T, (x, y)]."""
    frames, height, width = weights.shape
    x, y = torch.arange(width), torch.arange(height)
    total = weights.sum((1, 2))
    return (
        torch.stack([(weights.sum(1) * x).sum(1), (weights.sum(2) * y).sum(1)], 1) / total[:, None]
    )


def test_batch_has_the_promised_shape_and_range(generator):
    video, captions, specs = generator.batch(4, seed=1)
    assert video.shape == (4, 3, 5, HEIGHT, WIDTH) and video.dtype == torch.float32
    assert video.isfinite().all() and video.min() >= -1 and video.max() <= 1
    assert captions == [spec.caption for spec in specs]


def test_the_seed_decides_everything(generator):
    first, second = generator.batch(3, seed=5), generator.batch(3, seed=5)
    assert torch.equal(first[0], second[0]) and first[1:] == second[1:]
    assert generator.batch(3, seed=6)[1] != first[1]


def test_a_clip_does_not_depend_on_its_batch(generator):
    video, _, specs = generator.batch(6, seed=2)
    for i, spec in enumerate(specs):
        # A last bit of rounding may move a hard edge, such as a window's, by a pixel.
        assert ((generator.render([spec])[0] - video[i]).abs() > 1e-3).float().mean() < 1e-3


@pytest.mark.parametrize("frames", [1, 5, 49])
def test_any_number_of_frames_spans_the_same_motion(device, frames):
    spec = Spec("studio", (Item("ball", "red", 1, "right"),), seed=4)
    generator = ProceduralVideo(device, 32, 56, frames)
    centres = centroids(difference(generator, spec))
    assert len(centres) == frames
    ends = centroids(difference(ProceduralVideo(device, 32, 56, 2), spec))
    torch.testing.assert_close(centres[0], ends[0], atol=0.2, rtol=0)
    if frames > 1:
        torch.testing.assert_close(centres[-1], ends[-1], atol=0.2, rtol=0)


@pytest.mark.parametrize("place", PLACES)
def test_every_place_has_detail_and_answers_to_the_camera(generator, place):
    time = PLACES[place].times[0]
    still, panned, zoomed = generator.render(
        [
            Spec(place, (), time, camera=camera, seed=9)
            for camera in ("static", "pan left", "zoom in")
        ]
    )
    assert still.std() > 0.05
    assert (panned[:, -1] - still[:, -1]).abs().mean() > 0.003
    assert (zoomed[:, -1] - still[:, -1]).abs().mean() > 0.01


@pytest.mark.parametrize("place", [place for place in PLACES if len(PLACES[place].times) > 1])
def test_night_is_darker_than_day(generator, place):
    day, night = generator.render([Spec(place, (), time, seed=3) for time in ("day", "night")])
    assert night.mean() < day.mean() - 0.2


@pytest.mark.parametrize("weather", ["snow", "rain"])
def test_weather_falls(generator, weather):
    dry, wet = generator.render([Spec("city", (), "night", kind, seed=3) for kind in ("", weather)])
    change = (wet - dry).abs().sum(0)
    assert change.mean() > 0.01
    assert not torch.equal(change[0], change[1])


@pytest.mark.parametrize("camera", CAMERAS)
def test_every_camera_renders(generator, camera):
    clip = generator.render([Spec("meadow", (Item("dog"),), "day", camera=camera, seed=1)])[0]
    assert clip.isfinite().all() and clip.std() > 0.05


@pytest.mark.parametrize("motion", MOTIONS)
def test_every_motion_moves_and_stays_in_view(generator, motion):
    weights = difference(generator, Spec("studio", (Item("car", "red", 1, motion),), seed=6))
    assert (weights.amax((1, 2)) > 0.3).all()
    moved = (weights - weights[0]).abs().max() > 0.3
    assert moved == (motion != "still")


@pytest.mark.parametrize("name", ["cube", "fox", "rocket", "balloon"])
@pytest.mark.parametrize("place", ["space", "meadow"])
@pytest.mark.parametrize(
    ("motion", "axis", "sign"), [("left", 0, -1), ("right", 0, 1), ("up", 1, -1), ("down", 1, 1)]
)
def test_things_move_where_the_caption_says(generator, name, place, motion, axis, sign):
    colour = "red" if name in TINTABLE + SHAPES else ""
    time = PLACES[place].times[0]
    item = Item(name, colour, 1, motion)
    for seed in (1, 2):
        centres = centroids(difference(generator, Spec(place, (item,), time, seed=seed)))
        steps = centres.diff(dim=0) * sign
        assert (steps[:, axis] > 0.05 * HEIGHT).all()
        assert centres.diff(dim=0)[:, 1 - axis].abs().max() < 0.1 * HEIGHT


def test_growing_things_cover_more_and_shrinking_ones_less(generator):
    grown, shrunk = (
        (difference(generator, Spec("space", (Item("star", "red", 1, motion),), seed=1)) > 0.3).sum(
            (1, 2)
        )
        for motion in ("grow", "shrink")
    )
    assert grown[-1] > 4 * grown[0] and shrunk[0] > 4 * shrunk[-1]


@pytest.mark.parametrize("side", ["left", "right"])
def test_things_face_where_they_go(side):
    for name, thing in things().items():
        colour = "red" if name in TINTABLE + SHAPES else ""
        track = tracks(Spec("meadow", (Item(name, colour, 1, side),), "day"), 5, 1.75)[0]
        if thing.nose is not None:
            heading = np.degrees(track.angle) - thing.nose  # clockwise from right
            assert np.abs((heading - (0 if side == "right" else 180) + 180) % 360 - 180).max() < 30
            assert not track.mirrored
        elif thing.faces != "front":
            assert track.mirrored == (thing.faces != side)


def test_every_copy_is_drawn(generator):
    one, three = (
        (difference(generator, Spec("studio", (Item("cube", "red", count),), seed=1)) > 0.3)[0]
        for count in (1, 3)
    )
    columns = three.any(0)
    runs = (columns.int().diff() == 1).sum() + columns[0]
    assert runs == 3 and (one.any(0).int().diff() == 1).sum() == 1


@pytest.mark.parametrize("colour", COLOURS)
def test_tinted_pictures_and_shapes_have_their_hue(colour):
    for name in TINTABLE + SHAPES:
        rgba = texture(name, colour)[:, 0].permute(1, 2, 0)
        hue, saturation, value = rgb_to_hsv(rgba[..., :3])
        near = ((hue - COLOURS[colour] + 180) % 360 - 180).abs() < 20
        weight = rgba[..., 3] * saturation * value
        assert (weight * near).sum() / weight.sum() > 0.5, name


def test_hsv_is_the_inverse_of_rgb(device):
    rgb = torch.rand(100, 3, device=device)
    torch.testing.assert_close(hsv_to_rgb(*rgb_to_hsv(rgb)), rgb, atol=1e-5, rtol=0)


def test_lattice_is_uniform_and_known():
    cells = torch.arange(-50.0, 50.0)
    numbers = lattice(cells[:, None], cells[None], torch.tensor(0.3))
    assert abs(numbers.mean() - 0.5) < 0.01 and abs(numbers.std() - 12**-0.5) < 0.01
    beside = torch.stack([numbers[1:].flatten(), numbers[:-1].flatten()])
    assert torch.corrcoef(beside)[0, 1].abs() < 0.03
    assert not torch.equal(numbers, lattice(cells[:, None], cells[None], torch.tensor(0.31)))


@pytest.mark.parametrize("size", [{"frames": 0}, {"height": 0}, {"width": -3}])
def test_a_size_below_one_is_refused(size):
    with pytest.raises(ValueError, match="at least 1"):
        ProceduralVideo(**size)


def test_contact_sheet_is_a_png_of_the_right_size(generator, tmp_path):
    from PIL import Image

    video, captions, _ = generator.batch(3, seed=0)
    contact_sheet(video, captions, tmp_path / "sheet.png", columns=4)
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.format == "PNG"
        assert image.size == (4 * WIDTH, 3 * (HEIGHT + 16))
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    first = (video[0, :, 0].cpu() + 1) * 127.5
    assert (pixels[:, 16 : 16 + HEIGHT, :WIDTH] - first).abs().max() <= 1
    with pytest.raises(ValueError, match="caption for each"):
        contact_sheet(video, captions[:2], tmp_path / "other.png")
