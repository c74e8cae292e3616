"""How much a video moves: the largest optical flow between its neighbouring frames."""

import numpy as np
import torch
from torch import Tensor

from vdit_sparse.eval.frames import levels
from vdit_sparse.eval.metrics.parts.colour import luma
from vdit_sparse.eval.metrics.parts.sources import module_missing

FASTEST = 0.05
SMALLEST = 32


def dis_motion_per_pair(video: Tensor) -> Tensor:
    """Mean length of the flow over the fastest 5 % of pixels, in percent of the frame's shorter
    side, for each pair of neighbouring frames: float64 `[T - 1]`.

    The statistic of VBench's `dynamic_degree` (arXiv 2311.17982), without its threshold, and with
    OpenCV's DIS flow (Kroeger et al., ECCV 2016, arXiv 1603.03590; preset "medium") where VBench
    has RAFT: its values are no values of VBench. VBench's threshold for a moving pair would be
    2.3 percent.

    video: `[T, C, H, W]`, C = 1 or 3 (RGB), uint8, or float in [0, 1], of at least two frames with
    sides of at least 32 pixels; else ValueError.
    """
    grey = luma(levels(video, video)).round().byte().cpu().numpy()
    if len(grey) < 2 or min(grey.shape[1:]) < SMALLEST:
        raise ValueError(
            f"Optical flow needs at least two frames of at least {SMALLEST} x {SMALLEST} pixels, "
            f"got {len(grey)} of {grey.shape[1]} x {grey.shape[2]}."
        )
    import cv2

    search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    pairs = zip(grey[:-1], grey[1:], strict=True)
    fast = [_fastest(search.calc(one, other, None)) for one, other in pairs]
    return torch.tensor(fast, dtype=torch.float64) * (100 / min(grey.shape[1:]))


def unavailable() -> str | None:
    return module_missing("cv2", "opencv-python-headless")


def _fastest(flow: np.ndarray) -> float:
    lengths = np.sort(np.linalg.norm(flow.astype(np.float64), axis=-1), axis=None)
    return float(lengths[-max(1, int(FASTEST * lengths.size)) :].mean())
