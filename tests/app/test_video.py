"""Files are whole or not there, and show what they should."""

import contextlib

import imageio.v3 as iio
import imageio_ffmpeg
import pytest
import torch

from vdit_sparse.app.video import (
    GAP,
    Panel,
    contact_sheet,
    file_of,
    new_file,
    side_by_side,
    write_clip,
    write_image,
    write_video,
)


def clip(frames=5, height=32, width=48):
    """Smooth frames whose brightness tells their number."""
    ramp = torch.linspace(0, 100, width).expand(frames, 3, height, width)
    return (ramp + torch.arange(frames).view(-1, 1, 1, 1) * 30).to(torch.uint8)


def test_a_video_reads_back(tmp_path):
    frames = clip()
    write_video(tmp_path / "a.mp4", frames, fps=10)
    read = torch.from_numpy(iio.imread(tmp_path / "a.mp4"))
    assert read.shape == (5, 32, 48, 3)
    assert (read.float() - frames.permute(0, 2, 3, 1).float()).abs().mean() < 3
    meta = next(imageio_ffmpeg.read_frames(str(tmp_path / "a.mp4")))
    assert meta["codec"] == "h264" and meta["pix_fmt"].startswith("yuv420p") and meta["fps"] == 10
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]


def test_an_odd_size_is_padded_by_a_pixel(tmp_path):
    write_video(tmp_path / "a.mp4", clip(height=33, width=47), fps=8)
    assert iio.imread(tmp_path / "a.mp4").shape == (5, 34, 48, 3)


def test_one_frame_is_an_image_with_every_pixel(tmp_path):
    frames = clip(1, height=33, width=47)
    path = tmp_path / file_of("a", frames)
    write_clip(path, frames, fps=8)
    read = torch.from_numpy(iio.imread(tmp_path / "a.png"))
    assert torch.equal(read, frames[0].permute(1, 2, 0))
    write_clip(tmp_path / file_of("a", clip(2)), clip(2), fps=8)
    assert iio.imread(tmp_path / "a.mp4").shape == (2, 32, 48, 3)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_broken_writer_leaves_nothing(tmp_path, monkeypatch, error):
    real = imageio_ffmpeg.write_frames

    def breaks(*arguments, **options):
        with contextlib.closing(real(*arguments, **options)) as writer:
            yield writer.send(None)
            for _ in range(2):
                writer.send((yield))
            raise error

    monkeypatch.setattr(imageio_ffmpeg, "write_frames", breaks)
    (tmp_path / "a.mp4").write_text("former")
    with pytest.raises(error):
        write_video(tmp_path / "a.mp4", clip(), fps=10)
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_text() == "former"


def test_lost_frames_are_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(imageio_ffmpeg, "count_frames_and_secs", lambda _: (4, 0.4))
    with pytest.raises(OSError, match="4 of 5 frames"):
        write_video(tmp_path / "a.mp4", clip(), fps=10)
    assert not list(tmp_path.iterdir())


def test_a_new_file_appears_at_the_end_only(tmp_path):
    with new_file(tmp_path / "a.json") as temporary:
        temporary.write_text("{}")
        assert not (tmp_path / "a.json").exists() and temporary.parent == tmp_path
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("runs", [2, 3, 4])
def test_side_by_side_shows_every_frame_of_every_run(runs):
    panels = [Panel(clip() + 5 * i, f"run {i}", "density 0.5") for i in range(runs)]
    video = side_by_side(panels)
    factor = 7  # 48 pixels are enlarged to 336
    columns = min(runs, 3)
    assert video.shape[0] == 5 and video.shape[-1] == columns * 48 * factor + (columns - 1) * GAP
    for i, panel in enumerate(panels):
        left = i % 3 * (48 * factor + GAP)
        bottom = video.shape[2] if i >= columns or runs <= 3 else (video.shape[2] - GAP) // 2
        shown = video[:, :, bottom - 32 * factor : bottom, left : left + 48 * factor]
        assert torch.equal(shown[..., ::factor, ::factor], panel.frames)
    label = video[0, :, : video.shape[2] // 8]
    assert label.max() > 200, "no text"


def test_contact_sheet_has_a_row_a_run_and_five_frames(tmp_path):
    panels = [Panel(clip(9, 256, 448), "dense", "density 1"), Panel(clip(9, 256, 448), "radial")]
    sheet = contact_sheet(panels, "a prompt")
    assert sheet.dtype == torch.uint8
    assert sheet.shape[2] == 5 * 448 + 4 * GAP + 2 * GAP
    assert 2 * 256 < sheet.shape[1] < 2 * 256 + 220
    last_row = sheet[:, -GAP - 256 : -GAP, GAP:-GAP]
    for column, frame in enumerate((0, 2, 4, 6, 8)):
        left = column * (448 + GAP)
        assert torch.equal(last_row[..., left : left + 448], panels[1].frames[frame])
    write_image(tmp_path / "sheet.png", sheet)
    assert iio.imread(tmp_path / "sheet.png").shape == (*sheet.shape[1:], 3)


def test_a_long_label_is_cut_and_not_overflown():
    long = Panel(clip(1), "x" * 500, "y" * 500)
    assert side_by_side([long]).shape[-1] == side_by_side([Panel(clip(1), "x", "y")]).shape[-1]
