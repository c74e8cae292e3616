"""Comparing two videos by a filter of the ffmpeg that comes with imageio-ffmpeg."""

import re
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from imageio_ffmpeg import get_ffmpeg_exe
from torch import Tensor

from vdit_sparse.eval.frames import levels
from vdit_sparse.eval.metrics.parts.colour import rgb
from vdit_sparse.eval.metrics.parts.metric import Unavailable

LOG = "log"
FPS = 16
"""Frames a second that ffmpeg is told; only XPSNR's weights of motion know it."""


def compared(video: Tensor, reference: Tensor, filter_and_options: str, smallest: int) -> str:
    """What an ffmpeg filter of two inputs writes into its file `log`.

    Both videos go in as raw 8-bit RGB and are converted to 4:2:0 in BT.709, limited range, as a
    player's file of them would be; no codec touches them.

    video, reference: RGB `[T, 3, H, W]`, uint8 or float in [0, 1], sides of at least `smallest`
    pixels; filter_and_options: "[a][b]name=...", `a` being the video and `b` the reference, for
    filters differ in their order. Raises ValueError if the videos differ in shape or are no such
    videos, Unavailable with ffmpeg's last line if it fails.
    """
    pair = rgb(levels(video, reference)), rgb(levels(reference, video))
    height, width = video.shape[-2:]
    if min(height, width) < smallest:
        raise ValueError(
            f"Expected frames of at least {smallest} x {smallest} pixels for ffmpeg's "
            f"{filter_and_options[6:].split('=')[0]}, got {height} x {width}."
        )
    with TemporaryDirectory() as folder:
        for name, frames in zip("ab", pair, strict=True):
            content = frames.permute(0, 2, 3, 1).contiguous().cpu().numpy().tobytes()
            (Path(folder) / name).write_bytes(content)
        command = _command(height, width, filter_and_options)
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip() or "no message").splitlines()[-1]
            raise Unavailable(f"ffmpeg failed with code {done.returncode}: {reason}")
        return (Path(folder) / LOG).read_text()


def _command(height: int, width: int, filter_and_options: str) -> list[str]:
    same = "scale=out_color_matrix=bt709:out_range=tv,format=yuv420p"
    graph = f"[0:v]{same}[a];[1:v]{same}[b];{filter_and_options}"
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(FPS)]
    inputs = [*raw, "-i", "a", *raw, "-i", "b"]
    quiet = ["-nostdin", "-v", "error"]
    return [get_ffmpeg_exe(), *quiet, *inputs, "-lavfi", graph, "-f", "null", "-"]


@cache
def filter_missing(name: str) -> str | None:
    """Why a filter cannot be used here, or None."""
    done = subprocess.run([get_ffmpeg_exe(), "-filters"], capture_output=True, text=True)
    if re.search(rf"\s{name}\s", done.stdout):
        return None
    return (
        f"the ffmpeg at {get_ffmpeg_exe()} has no filter {name}: use the one that comes with "
        "imageio-ffmpeg, or a build that has it."
    )
