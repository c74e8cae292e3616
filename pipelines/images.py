"""What families of image models share: an image is one frame."""

import torch
from torch import Tensor

from vdit_sparse.grid import Grid
from vdit_sparse.method import SparseAttention
from vdit_sparse.methods import DraftAttention, RadialAttention

# For checkpoints of 4 to 9 steps without guidance. Ours, at a density that no source names and that
# has not been measured: such runs are too short for a dense quarter, or for a search of places.
FEW_STEPS = DraftAttention(density=0.5, dense_steps=1, last_dense_steps=1)


def refuses_images(transformer: torch.nn.Module, method: SparseAttention) -> str | None:
    """Why a method cannot run on images, or None."""
    if isinstance(method, RadialAttention):
        return "it keeps all tokens of a frame, and an image is one frame, so it would be dense"
    return None


def grid_of_ids(ids: Tensor, text: int) -> Grid:
    """The target's rows and columns, read off `ids` `[S, 3]` or `[B, S, 3]` (image, row, column,
    and what more there is) of FLUX and its kin. Reference images follow the target with another
    first number and count as text, as the `text` tokens of the prompt do."""
    ids = ids[0] if ids.ndim == 3 else ids
    own = ids[:, 0] == 0
    last = ids.float().masked_fill(~own[:, None], 0).amax(0)
    tokens, height, width = torch.stack([own.sum().float() - 1, last[1], last[2]]).int().tolist()
    tokens, height, width = tokens + 1, height + 1, width + 1
    if tokens != height * width:
        raise ValueError(
            f"img_ids must list the image row by row, got {tokens} tokens for {height} x {width}."
        )
    return Grid(1, height, width, text + len(ids) - tokens)
