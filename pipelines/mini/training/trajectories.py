"""What the few-step student learns from: its times, its teacher, and samples on their way."""

from dataclasses import dataclass

import torch
from diffusers import UniPCMultistepScheduler, WanTransformer3DModel
from torch import Tensor, nn

from vdit_sparse.pipelines.mini.training.latents import LatentSet
from vdit_sparse.pipelines.mini.training.models import build_scheduler


def build_few_step_scheduler(steps: int, shift: float) -> UniPCMultistepScheduler:
    """Builds the student's sampler: Euler steps over the flow, at the times of the Wan sampler.

    UniPC of order 1 without its corrector is Euler's method. `FlowMatchEulerDiscreteScheduler`
    would spend its last step between shifted 1/1000 and 0.
    """
    return UniPCMultistepScheduler.from_config(
        build_scheduler(shift).config, solver_order=1, disable_corrector=list(range(steps))
    )


@dataclass(frozen=True)
class Times:
    """Where the student is asked, read off its sampler.

    Attributes:
        sigmas: `[steps + 1]` fp32 noise levels, from 1 to 0.
        timesteps: `[steps]` fp32, what the transformer is told: 1000 sigma, cut to an integer, as
            the sampler cuts it.
    """

    sigmas: Tensor
    timesteps: Tensor

    @classmethod
    def of(cls, steps: int, shift: float, device: str) -> "Times":
        scheduler = build_few_step_scheduler(steps, shift)
        scheduler.set_timesteps(steps)
        return cls(scheduler.sigmas.to(device), scheduler.timesteps.to(device).float())


@dataclass(frozen=True)
class Teacher:
    """The guided denoiser whose flow the student follows.

    Attributes:
        transformer: frozen.
        empty: `[1, 64, text_dim]`, the states of the empty caption.
        guidance: classifier-free guidance scale.
        steps: midpoint steps from one student time to the next.
    """

    transformer: WanTransformer3DModel
    empty: Tensor
    guidance: float
    steps: int

    @torch.no_grad()
    def velocity(self, latents: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        """Returns the guided velocity at `sigma [batch]`, both halves in one forward."""
        states = torch.cat([text, self.empty.expand_as(text)])
        both = predict(
            self.transformer, latents.repeat(2, 1, 1, 1, 1), 1000 * sigma.repeat(2), states
        )
        conditional, unconditional = both.chunk(2)
        return torch.lerp(unconditional, conditional, self.guidance)

    @torch.no_grad()
    def mean_velocity(self, latents: Tensor, start: Tensor, end: Tensor, text: Tensor) -> Tensor:
        """Returns the velocity that leads straight to where the guided flow arrives.

        The explicit midpoint method never asks at `end`, which may be 0, where nothing was trained.

        Args:
            latents: `[batch, channels, frames, height, width]` at noise level `start`.
            start: `[batch]`, in [0, 1].
            end: `[batch]`, below `start`.
            text: `[batch, 64, text_dim]`.
        """
        step = (start - end) / self.steps
        width = step.view(-1, 1, 1, 1, 1)
        total = torch.zeros_like(latents)
        for number in range(self.steps):
            sigma = start - number * step
            middle = latents - width / 2 * self.velocity(latents, sigma, text)
            velocity = self.velocity(middle, sigma - step / 2, text)
            latents = latents - width * velocity
            total += velocity
        return total / self.steps


class Trajectories:
    """A batch of samples on their way from noise to video, each at its own student time.

    Some moves are the student's, so that it learns on what it will meet (DAgger, arXiv 1011.0686),
    the others the teacher's, so that a bad student does not spoil its own lessons; and some
    trajectories begin at a clip with noise, at any student time. A finished one starts anew.
    Nothing here waits for the device.

    Args:
        data: clips to begin at, and captions.
        sigmas: `[steps + 1]`, the student's noise levels.
        batch: trajectories.
        shares: of the trajectories, begun at a clip; of the moves, taken by the student.

    Attributes:
        latents: `[batch, channels, frames, height, width]` fp32.
        tokens: `[batch, 64]` int64.
        index: `[batch]` int64, the student step that comes next.
    """

    def __init__(
        self, data: LatentSet, sigmas: Tensor, batch: int, shares: tuple[float, float]
    ) -> None:
        self._data, self._sigmas, self._batch = data, sigmas, batch
        self._data_share, self._student_share = shares
        # At any time, or all would march in step for ever.
        self.latents, self.tokens, self.index = self._start(data_share=1.0)

    def span(self) -> tuple[Tensor, Tensor]:
        """Returns the noise levels before and after the next step, `[batch]` each."""
        return self._sigmas[self.index], self._sigmas[self.index + 1]

    def advance(self, student: Tensor, teacher: Tensor) -> None:
        """Moves every sample by one of the two velocities, and replaces the finished ones."""
        start, end = (sigma.view(-1, 1, 1, 1, 1) for sigma in self.span())
        by_student = torch.rand_like(start) < self._student_share
        arrived = self.latents - (start - end) * torch.where(by_student, student, teacher)
        latents, tokens, index = self._start(self._data_share)
        finished = self.index == len(self._sigmas) - 2
        self.latents = torch.where(finished.view(-1, 1, 1, 1, 1), latents, arrived)
        self.tokens = torch.where(finished[:, None], tokens, self.tokens)
        self.index = torch.where(finished, index, self.index + 1)

    def _start(self, data_share: float) -> tuple[Tensor, Tensor, Tensor]:
        latents, tokens = self._data.draw(self._batch, 0.0)
        index = torch.randint(len(self._sigmas) - 1, tokens.shape[:1], device=tokens.device)
        from_clip = torch.rand(index.shape, device=index.device) < data_share
        index = torch.where(from_clip, index, 0)
        sigma = self._sigmas[index].view(-1, 1, 1, 1, 1)
        return torch.lerp(latents, torch.randn_like(latents), sigma), tokens, index


def predict(transformer: nn.Module, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
    """Returns the velocity in fp32 at `timestep [batch]`, 0 to 1000; text stays at 64 tokens."""
    return transformer(
        hidden_states=latents,
        timestep=timestep,
        encoder_hidden_states=text,
        return_dict=False,
    )[0].float()
