"""What the denoiser trains on, when: its settings, and a text form for several stages in a row."""

from dataclasses import dataclass, fields, replace

from vdit_sparse.pipelines.mini.training.clips import ClipShape

SEPARATOR = "/"
# These hold for the whole process; everything else may differ between the stages.
_WHOLE_RUN = ("stages", "rate", "adamw_rate", "average_seconds", "compiled", "fused")


@dataclass(frozen=True)
class DenoiserSettings:
    """How the denoiser is trained; README.md has the recipe.

    Attributes:
        stages: several resolutions in one process (`parse_stages`); empty for one, by the other
            options.
        seconds: a whole stage, rendering and compiling included.
        render_seconds: at most this long for rendering and encoding.
        clips: clips to hold at most; those kept by an earlier call count.
        stills: single frames, rendered alone, to add to the batches of images.
        long_clips: clips of twice the length (`2 frames - 1`); 0 leaves them out.
        long_share: share of the batches of clips that are long ones.
        images: share of the batches that are the first latent frames of clips, at the start.
        images_end: that share at the end, linear in between.
        image_frames: how many latent frames an image batch has, like "1" or "1,3"; each number
            is one compilation more.
        image_shift: `shift` for images. A clip shows each thing several times, so the same noise
            hides less of it than of an image.
        phrasings: captions per clip, drawn from at every use.
        batch: clips a step; images have as many more as make the same number of tokens, long
            clips three eighths.
        shift: of the noise levels, `t' = s t / (1 + (s-1) t)`; larger pictures need more noise.
        rate: Muon's learning rate at factor 1.
        adamw_rate: AdamW's.
        peak: learning-rate factor at the start, after warming up.
        final: learning-rate factor at the end, a cosine in between.
        average_seconds: length of the moving average of the weights.
        keep_latents: write the rendered latents beside the checkpoints and read them in a later
            call, which then renders only what is missing.
        earlier_calls: that rendered clips on machines which are gone: this one renders others.
        compiled: compile the transformer's blocks.
        fused: queries, keys and values in one matrix product (`fused_attention.py`).
        attention: diffusers' backend for self-attention, or "fastest" to time them first.
    """

    stages: str = ""
    seconds: float = 500.0
    render_seconds: float = 60.0
    clips: int = 24_000
    stills: int = 0
    long_clips: int = 600
    long_share: float = 0.1
    images: float = 0.7
    images_end: float = 0.1
    image_frames: str = "1"
    image_shift: float = 1.0
    phrasings: int = 8
    batch: int = 64
    shift: float = 3.0
    rate: float = 2e-3
    adamw_rate: float = 1.5e-3
    peak: float = 1.0
    final: float = 0.02
    average_seconds: float = 30.0
    keep_latents: bool = False
    earlier_calls: int = 0
    compiled: bool = True
    fused: bool = True
    attention: str = "fastest"

    def __post_init__(self) -> None:
        for name in ("images", "images_end", "long_share"):
            share = getattr(self, name)
            if not 0 <= share <= 1:
                raise ValueError(f"expected {name} from 0 to 1, got {share}")
        if self.phrasings < 1:
            raise ValueError(f"expected phrasings of at least 1, got {self.phrasings}")

    def frame_counts(self) -> list[int]:
        """Returns `image_frames` as numbers."""
        return [int(word) for word in self.image_frames.split(",")]

    def image_share(self, fraction: float) -> float:
        """Returns the share of image batches at `fraction` (0 to 1) of the stage."""
        return self.images + (self.images_end - self.images) * fraction


def parse_stages(
    shape: ClipShape, settings: DenoiserSettings
) -> list[tuple[ClipShape, DenoiserSettings]]:
    """Returns the size and the settings of every stage.

    `settings.stages` is a list of stages with `/` between them. A stage is a size
    `HEIGHTxWIDTH` or `HEIGHTxWIDTHxFRAMES` (pixels and frames), followed by `name=value` words
    that replace options for this stage alone: `128x224 seconds=200 batch=128 / 256x448`.

    Args:
        shape: size of the only stage where `stages` is empty; frames and device of all others.
        settings: what a stage does not say.
    """
    if not settings.stages:
        return [(shape, settings)]
    return [_parse(text.split(), shape, settings) for text in settings.stages.split(SEPARATOR)]


def _parse(
    words: list[str], shape: ClipShape, settings: DenoiserSettings
) -> tuple[ClipShape, DenoiserSettings]:
    if not words:
        raise ValueError(f"expected a stage on both sides of every '/', got {settings.stages!r}")
    kinds = {item.name: item.type for item in fields(settings) if item.name not in _WHOLE_RUN}
    changes = {}
    for word in words[1:]:
        name, _, value = word.partition("=")
        name = name.replace("-", "_")
        if name not in kinds:
            raise ValueError(f"expected one of {sorted(kinds)} and a value, got {word!r}")
        changes[name] = value == "1" if kinds[name] is bool else kinds[name](value)
    return _size(words[0], shape), replace(settings, **changes)


def _size(word: str, shape: ClipShape) -> ClipShape:
    numbers = word.split("x")
    if len(numbers) not in (2, 3) or not all(number.isdigit() for number in numbers):
        raise ValueError(f"expected a size like 256x448 or 256x448x25, got {word!r}")
    height, width, *frames = map(int, numbers)
    return ClipShape(height, width, *(frames or [shape.frames]), shape.device)
