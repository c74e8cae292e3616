"""What families of image models share: an image is one frame."""

import torch

from vdit_sparse.method import SparseAttention
from vdit_sparse.methods import RadialAttention


def refuses_images(transformer: torch.nn.Module, method: SparseAttention) -> str | None:
    """Why a method cannot run on images, or None."""
    if isinstance(method, RadialAttention):
        return "it keeps all tokens of a frame, and an image is one frame, so it would be dense"
    return None
