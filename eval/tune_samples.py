"""The runs that `vdit-sparse tune` goes by: the same prompts and noise, dense and otherwise."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vdit_sparse.eval.denoise import latents, timed_call, use, warm_up
from vdit_sparse.eval.metrics import METRICS
from vdit_sparse.method import SparseAttention


@dataclass(frozen=True, eq=False)
class Samples:
    """Prompts with their seeds on a loaded pipeline.

    prompts, seeds: one of each for a sample. settings: the other arguments of the pipeline's call.
    batch: samples that run at once.
    """

    pipe: object
    prompts: Sequence[str]
    seeds: Sequence[int]
    settings: Mapping
    batch: int = 1

    def __post_init__(self):
        if not self.prompts or len(self.prompts) != len(self.seeds) or self.batch < 1:
            raise ValueError(
                "Tuning needs prompts, a seed for each and a batch of at least 1, got "
                f"{len(self.prompts)} prompts, {len(self.seeds)} seeds and batch={self.batch}."
            )

    def latents(self, method: SparseAttention | None) -> Tensor:
        """The final latents of all samples, fp32 `[N, ...]`, on the device. Raises RuntimeError
        for NaN."""
        use(self.pipe, method)
        found = torch.cat([latents(self.pipe, inputs).float() for inputs in self._inputs()])
        if not found.isfinite().all():
            raise RuntimeError("The latents hold NaN; load the model in bf16 or fp32.")
        return found

    def density(self) -> float:
        """Mean density of the last run."""
        from vdit_sparse.pipelines.attach import summary

        return summary(self.pipe).density

    def frames(self, method: SparseAttention | None) -> Tensor:
        """The decoded frames of all samples, uint8 `[N, T, 3, H, W]` on the CPU."""
        use(self.pipe, method)
        runs = [timed_call(self.pipe, inputs, lambda *_: None)[0] for inputs in self._inputs()]
        return torch.cat(runs)

    def psnr(self, method: SparseAttention, reference: Tensor) -> list[float]:
        """PSNR of each sample against frames of dense attention, in dB."""
        device = torch.device(self.pipe.device)
        pairs = zip(self.frames(method), reference, strict=True)
        return [METRICS["psnr"](x.to(device), y.to(device)) for x, y in pairs]

    def seconds(self, method: SparseAttention | None) -> float:
        """Denoising time of a sample of the first batch, after a warm-up: the least of two runs."""
        inputs = self._inputs()[0]
        warm_up(self.pipe, method, inputs)
        use(self.pipe, method)
        clocks = [timed_call(self.pipe, inputs, lambda *_: None)[1] for _ in range(2)]
        return min(clock.denoise_seconds for clock in clocks) / len(inputs["seed"])

    def inputs(self) -> dict:
        """The arguments of the first batch, as `eval.denoise.run` takes them."""
        return self._inputs()[0]

    def _inputs(self) -> list[dict]:
        starts = range(0, len(self.prompts), self.batch)
        return [
            {
                **self.settings,
                "prompt": list(self.prompts[at : at + self.batch]),
                "seed": list(self.seeds[at : at + self.batch]),
            }
            for at in starts
        ]


def error_db(x: Tensor, reference: Tensor) -> float:
    """Error of latents `[N, ...]`, |x - reference|^2 / |reference|^2 of each sample, in dB, mean
    over the samples as PSNR's is; at least -100."""
    gap = (x - reference).flatten(1).double().square().sum(1)
    share = gap / reference.flatten(1).double().square().sum(1)
    return float((10 * share.clamp(min=1e-10).log10()).mean())
