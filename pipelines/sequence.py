"""The two orders of a sequence: the model's own, and the one that methods see, video first."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vdit_sparse.grid import Grid


@dataclass(frozen=True, eq=False)
class VideoFirst:
    """Moves the tokens of one attention call to "video, real text, padding" and back.

    Text is every token that is no video token: prompts, but also reference images and the like.

    grid: the tokens; lead: how many text tokens stand before the video in the model's order, the
    rest stands after it; real: bool `[B, grid.text]`, which text tokens are no padding, in the
    model's order, or None if all are.
    """

    grid: Grid
    lead: int = 0
    real: Tensor | None = None

    @cached_property
    def kv_len(self) -> Tensor | None:
        """Real tokens of each batch row, int32 `[B]`, or None if all are."""
        if self.real is None:
            return None
        return self.real.sum(1, dtype=torch.int32) + self.grid.video

    def move(self, x: Tensor) -> Tensor:
        """`[B, S, H, D]` in the model's order -> in that of methods, padding filled with zeros so
        that what stands there cannot matter."""
        if not self.lead and self.real is None:
            return x
        sizes = (self.lead, self.grid.video, self.grid.text - self.lead)
        first, video, last = x.split(sizes, dim=1)
        text = torch.cat([first, last], dim=1)
        if self.real is not None:
            text = text.masked_fill(~self.real[..., None, None], 0)
            text = text.gather(1, self._order.expand_as(text))
        return torch.cat([video, text], dim=1)

    def back(self, x: Tensor) -> Tensor:
        """The inverse of `move`."""
        if not self.lead and self.real is None:
            return x
        video, text = x.split((self.grid.video, self.grid.text), dim=1)
        if self.real is not None:
            text = torch.empty_like(text).scatter_(1, self._order.expand_as(text), text)
        return torch.cat([text[:, : self.lead], video, text[:, self.lead :]], dim=1)

    @cached_property
    def _order(self) -> Tensor:
        """Places of the text tokens, real ones first, int64 `[B, text, 1, 1]`."""
        padded = (~self.real).to(torch.uint8)
        return padded.argsort(dim=1, stable=True)[..., None, None]
