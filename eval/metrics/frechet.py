"""The Fréchet distance between two sets of videos, by a feature network of the caller's."""

from torch import Tensor, nn

from vdit_sparse.eval.frames import levels
from vdit_sparse.eval.metrics.parts.batches import over_frames, unit
from vdit_sparse.eval.metrics.parts.metric import Unavailable
from vdit_sparse.eval.metrics.parts.sources import module_missing


class FrechetDistance:
    """FID of frames, or FVD of clips, between videos and references, whose features accumulate.

        distance = FrechetDistance(network, features=2048)             # FID: every frame counts
        distance = FrechetDistance(network, features=400, frames=16)   # FVD: every 16 frames count
        for video, reference in pairs: distance.update(video, reference)
        distance.compute()

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of the features' means and covariances (Heusel et
    al., arXiv 1706.08500; for videos Unterthiner et al., arXiv 1812.01717), by torchmetrics in
    float64. No network comes along, and each gives another distance: call it FID or FVD only with
    the network of that name, and state the number of samples, on which it depends strongly. The
    covariances are full only with more samples than features.

    network: float32 RGB in [0, 1] -> `[samples, features]`: of pictures `[samples, 3, H, W]`, or
        with `frames` of clips `[samples, 3, frames, H, W]`. It does its own scaling of sizes and
        values, and is put into evaluation mode.
    features: how many it returns.
    frames: successive frames of a clip; what a video has beyond a multiple of it is left out.
    batch: samples given to the network at a time.

    Raises Unavailable without torchmetrics.
    """

    def __init__(
        self, network: nn.Module, features: int, *, frames: int | None = None, batch: int = 4
    ) -> None:
        if reason := unavailable():
            raise Unavailable(f"The Fréchet distance cannot run here: {reason}")
        from torchmetrics.image.fid import FrechetInceptionDistance

        self.frames, self.batch = frames, batch
        self._network = network.eval()
        self._sums = FrechetInceptionDistance(feature=_Given(features))

    def update(self, video: Tensor, reference: Tensor) -> None:
        """Adds a video to one set and a reference to the other; they need not be of one size.

        Each RGB `[T, 3, H, W]`, uint8, or float in [0, 1], on the network's device, with at least
        `frames` frames; else ValueError, and nothing is added.
        """
        found = [self._features(levels(each, each)) for each in (video, reference)]
        for each, real in zip(found, (False, True), strict=True):
            self._sums.to(each.device).update(each, real=real)

    def compute(self) -> float:
        """The distance, 0 or more. Raises ValueError before there are two samples of each set."""
        counts = self._sums.fake_features_num_samples, self._sums.real_features_num_samples
        if min(counts) < 2:
            raise ValueError(
                f"Expected at least two samples of each set, got {int(counts[0])} and "
                f"{int(counts[1])}: update with more videos."
            )
        return max(0.0, self._sums.compute().item())

    def _features(self, video: Tensor) -> Tensor:
        if self.frames is not None:
            if len(video) < self.frames:
                raise ValueError(f"Expected at least {self.frames} frames, got {len(video)}.")
            whole = video[: len(video) - len(video) % self.frames]
            video = whole.unflatten(0, (-1, self.frames)).transpose(1, 2)
        found = over_frames(lambda x: self._network(unit(x)), video, frames=self.batch)
        return found.double()


class _Given(nn.Module):
    """Stands where torchmetrics wants a network: the features are there already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        if features.shape[1:] != (self.num_features,):
            raise ValueError(
                f"Expected a network that returns [samples, {self.num_features}], got "
                f"{tuple(features.shape)}."
            )
        return features


def unavailable() -> str | None:
    return module_missing("torchmetrics", "torchmetrics")
