"""The token grid of one sequence: video tokens in raster order, then text."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Grid:
    """Latent tokens as a method sees them: `frames x height x width` in raster order (width
    fastest), then `text` tokens.

    All four are counts of tokens after patching, not pixels: a 25-frame 256x448 clip of the bundled
    model is `Grid(7, 16, 28)`, Wan 2.1 at 81x720x1280 is `Grid(21, 45, 80)`. An image is one frame.
    """

    frames: int
    height: int
    width: int
    text: int = 0

    def __post_init__(self):
        sizes = (self.frames, self.height, self.width)
        if min(sizes) < 1 or self.text < 0:
            raise ValueError(
                f"A grid needs at least one frame, row and column and no negative text, got {self}."
            )

    @property
    def frame_tokens(self) -> int:
        """Tokens of one latent frame."""
        return self.height * self.width

    @property
    def video(self) -> int:
        """Tokens of the whole video, without text."""
        return self.frames * self.height * self.width

    @property
    def tokens(self) -> int:
        """Tokens of the whole sequence: video, then text."""
        return self.video + self.text
