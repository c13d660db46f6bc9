"""Deterministic steps between noise and data, in either direction, along any noise path.

Towards data they are DDIM's (Song et al. 2020, arXiv 2010.02502, equation 12 without noise), or Euler's of a flow; the
way up again is their inverse. Both have the interface of diffusers' schedulers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from gtl.diffusion.path import NoisePath

PASSES = 3
"""Predictions for each step up."""


def step(path: NoisePath, noisy: Tensor, prediction: Tensor, t: Tensor, to: Tensor) -> Tensor:
    """From time t, not at the clean end, to another one; noisy [B, ...], times [B]."""
    clean = path.denoised(noisy, prediction, t)
    return path.add_noise(clean, path.noise_in(noisy, clean, t), to)


class Solver:
    """From noise to data, between a path's own `solver_times`."""

    def __init__(self, path: NoisePath, steps: int) -> None:
        """`steps` in all; one that has been inverted in part begins later."""
        self._path = path
        self._times = path.solver_times(steps)
        self.timesteps = self._times.flip(0)[:-1]

    def step(self, prediction: Tensor, timestep: Tensor, latents: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """Latents at the next time, from the model's output at this one."""
        earlier = self._times[self._times < timestep].max()
        t, to = (time.to(latents.device).view(1) for time in (timestep, earlier))
        return (step(self._path, latents, prediction, t, to),)


class Rising:
    """From data back to noise: to where a `Solver` of as many steps would have come from.

    What leads from a time to the one before depends on the model's output at the first, which is where to go. So it is
    looked up at the point found so far, PASSES times (as in ReNoise, Garibi et al. 2024, arXiv 2403.14602); after one
    it is plain DDIM inversion.
    """

    def __init__(self, path: NoisePath, steps: int, rises: int) -> None:
        """Of so many steps the last `rises`, those at the clean end."""
        self._path = path
        self._times = path.solver_times(steps)[: rises + 1]
        self.timesteps = self._times[1:].repeat_interleave(PASSES)
        self._done = 0
        self._below: Tensor | None = None

    def step(self, prediction: Tensor, timestep: Tensor, latents: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """The point at this time from which the model's output leads to where the last one was."""
        import torch

        number, turn = divmod(self._done, PASSES)
        if turn == 0 or self._below is None:
            self._below = latents
        self._done += 1
        t, to = (time.to(latents.device).view(1) for time in (timestep, self._times[number]))
        # A step is linear in both: below = a point + b prediction.
        one, none = (torch.full((1,) * latents.ndim, value, device=latents.device) for value in (1.0, 0.0))
        a, b = step(self._path, one, none, t, to), step(self._path, none, one, t, to)
        return ((self._below - b * prediction) / a,)
