"""Stage `sample`: eight fixed prompts through the exported pipeline, on one sheet."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import WanPipeline
from PIL import Image, ImageDraw

from vdit_sparse.pipelines.load import default_dtype
from vdit_sparse.pipelines.mini.training.clips import ClipShape
from vdit_sparse.pipelines.mini.training.latents import CAPTION_TOKENS
from vdit_sparse.pipelines.mini.training.pacing import report

PROMPTS = (
    "a red balloon rises up over a green meadow at sunset",
    "a rocket moves in a circle deep in blue water",
    "a fox walks to the right in the forest",
    "two blue cars drive left in a city at night",
    "a penguin bounces in front of snowy mountains while snow falls",
    "a yellow fish swims left deep in blue water, the camera pans right",
    "a ufo moves from left to right over a neon grid",
    "a pink cube rotates in place in a photo studio",
)
COLUMNS = 5
THUMBNAIL_WIDTH = 224
LABEL_HEIGHT = 14


@dataclass(frozen=True)
class Sampling:
    """How a clip is sampled.

    Attributes:
        steps: denoising steps.
        guidance: classifier-free guidance scale.
        seed: of the first prompt; every prompt has its own, counted on.
    """

    steps: int = 16
    guidance: float = 4.0
    seed: int = 0


def load(folder: Path, device: str) -> WanPipeline:
    """Loads an exported pipeline without a network, in bf16, or in fp32 on a CPU that does not
    multiply bf16, as `load_pipeline` does."""
    dtype = default_dtype(torch.device(device))
    pipeline = WanPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(
    pipeline: WanPipeline, prompt: str, shape: ClipShape, sampling: Sampling
) -> np.ndarray:
    """Returns a clip `[frames, height, width, 3]` float32 in [0, 1]; noise comes from the CPU."""
    return pipeline(
        prompt=prompt,
        negative_prompt="",
        height=shape.height,
        width=shape.width,
        num_frames=shape.frames,
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.guidance,
        max_sequence_length=CAPTION_TOKENS,
        generator=torch.Generator().manual_seed(sampling.seed),
        output_type="np",
    ).frames[0]


def clip_seconds(
    pipeline: WanPipeline, shape: ClipShape, sampling: Sampling, repeats: int
) -> list[float]:
    """Generates the first prompt once unseen and then `repeats` times: the seconds of these, from
    the text to the frames, denoising and decoding."""
    generate(pipeline, PROMPTS[0], shape, sampling)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        generate(pipeline, PROMPTS[0], shape, sampling)
        seconds.append(time.perf_counter() - start)
    return seconds


def seconds_table(
    seconds: list[float], shape: ClipShape, sampling: Sampling, dtype: torch.dtype
) -> str:
    """Markdown: the least, the median and the most of `clip_seconds`."""
    ordered = sorted(seconds)
    figures = (ordered[0], ordered[len(ordered) // 2], ordered[-1])
    size = f"{shape.frames} x {shape.height} x {shape.width}"
    head = "| clip | dtype | steps | guidance | seconds, least | median | most |"
    lines = [head, "|---" * 7 + "|"]
    kind, guidance = str(dtype).removeprefix("torch."), f"{sampling.guidance:g}"
    cells = (size, kind, str(sampling.steps), guidance, *(f"{x:.1f}" for x in figures))
    return "\n".join([*lines, f"| {' | '.join(cells)} |"])


def sample_sheet(
    pipeline: WanPipeline, shape: ClipShape, sampling: Sampling, path: Path
) -> list[np.ndarray]:
    """Samples the eight prompts, writes the sheet as an image and returns the clips."""
    clips = []
    for index, prompt in enumerate(PROMPTS):
        one = Sampling(sampling.steps, sampling.guidance, sampling.seed + index)
        clips.append(generate(pipeline, prompt, shape, one))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet(clips, PROMPTS).save(path)
    report(f"wrote {path}: {len(clips)} clips of {shape}, {sampling}")
    return clips


def sheet(clips: list[np.ndarray], captions: tuple[str, ...]) -> Image.Image:
    """Draws one labelled row of five evenly spaced frames per clip."""
    frames, height, width, _ = clips[0].shape
    size = (THUMBNAIL_WIDTH, THUMBNAIL_WIDTH * height // width)
    row = size[1] + LABEL_HEIGHT
    picture = Image.new("RGB", (COLUMNS * size[0], len(clips) * row), "white")
    draw = ImageDraw.Draw(picture)
    moments = np.linspace(0, frames - 1, COLUMNS).round().astype(int)
    for index, (clip, caption) in enumerate(zip(clips, captions, strict=True)):
        draw.text((3, index * row + 1), caption, fill="black")
        for column, moment in enumerate(moments):
            pixels = (clip[moment] * 255).round().clip(0, 255).astype(np.uint8)
            thumbnail = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)
            picture.paste(thumbnail, (column * size[0], index * row + LABEL_HEIGHT))
    return picture
