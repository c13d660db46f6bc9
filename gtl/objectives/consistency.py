"""Step distillation: a student that is, anywhere on the teacher's way, where the teacher comes out at its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gtl.adapters.apply import without_adapters
from gtl.config.objectives import ConsistencyObjective
from gtl.objectives.denoise import CONDITION, STRATA, conditions_of, stack, under
from gtl.types import Batch, Item, Losses, UserError

if TYPE_CHECKING:
    from gtl.families.base import Conditions, DiffusionFamily

EMPTY = "empty."
"""Prefix of the conditions that the teacher's guidance leads away from."""


class Consistency:
    """Latent consistency distillation by adapters (LCM-LoRA, Luo et al. 2023, arXiv 2310.04378 and 2311.05556).

    Its teacher is the model under the adapters, and its target the adapted model itself, without a gradient.
    """

    def __init__(self, config: ConsistencyObjective, family: DiffusionFamily) -> None:
        """The family's noise path says what a step of the teacher's solver is: DDIM's (arXiv 2010.02502), or Euler's.

        Raises:
            UserError: the teacher cannot take as many steps.
        """
        if config.solver_steps > family.path.num_train_timesteps:
            raise UserError(
                f"objective.solver_steps: {config.solver_steps}: expected at most {family.path.num_train_timesteps}, "
                "the steps that the model was trained on"
            )
        self.config = config
        self.family = family
        self.times = family.path.solver_times(config.solver_steps)
        self.is_guided = family.classifier_free and config.guidance > 1

    @property
    def parts(self) -> tuple[str, ...]:
        """The denoiser."""
        return (self.family.main,)

    @property
    def strata(self) -> int:
        """Quarters of the way to noise."""
        return STRATA

    @property
    def judged(self) -> str:
        """The distance from where the teacher leads, squared."""
        return "mse"

    def draw(self, item: Item, rng: torch.Generator, stratum: int | None = None) -> dict[str, Tensor]:
        """One sample: clean and noise [C, h, w], t and the time `earlier` of the teacher's next step [], conditions."""
        shape, steps = item.latents["mean"].shape, self.config.solver_steps
        posterior, noise = torch.randn(shape, generator=rng), torch.randn(shape, generator=rng)
        u = torch.rand((), generator=rng)
        step = int((u if stratum is None else (stratum + u) / STRATA) * steps)
        moments = {name: value.float()[None] for name, value in item.latents.items()}
        beside = self.family.size_conditions(item.geometry)
        beside |= self.family.guidance_conditions(1.0 if self.family.classifier_free else self.config.guidance)
        empty = {**self.family.unconditional(item.null_conditions), **beside} if self.is_guided else {}
        return {
            "clean": self.family.sample_latents(moments, posterior[None])[0],
            "noise": noise,
            "t": self.times[step + 1],
            "earlier": self.times[step],
            **{CONDITION + name: value for name, value in {**item.conditions, **beside}.items()},
            **{EMPTY + name: value for name, value in empty.items()},
        }

    def collate(self, samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Stack draws to a batch; the family pads conditions."""
        return stack(samples, self.family, (CONDITION, EMPTY))

    def players(self, parts: dict[str, nn.Module], dtype: torch.dtype) -> dict[str, nn.Module]:
        """One player, `student`, over the family's main part."""
        return {"student": Student(parts[self.family.main], self.family, self.config, dtype)}


class Student(nn.Module):
    """A model with adapters, its teacher without them, and how far the one is from where the other leads."""

    def __init__(
        self, main: nn.Module, family: DiffusionFamily, config: ConsistencyObjective, dtype: torch.dtype
    ) -> None:
        """Trained weights are fp32 whatever the arithmetic's dtype; other than fp32 it runs under autocast."""
        super().__init__()
        self.main = main
        self.family = family
        self.path = family.path
        self.config = config
        self.dtype = dtype

    def forward(self, batch: Batch) -> Losses:
        """The batch's share of the mean loss, over the elements of a sample; part `mse` is of the same distance."""
        clean, noise, t, earlier = (batch.tensors[name] for name in ("clean", "noise", "t", "earlier"))
        conditions = conditions_of(batch.tensors)
        noisy = self.path.add_noise(clean, noise, t)
        with torch.no_grad():
            before = self._solve(noisy, t, earlier, conditions, under(EMPTY, batch.tensors))
            wanted = self.path.consistent(before, self._predict(before, earlier, conditions), earlier)
        drawn = self.path.consistent(noisy, self._predict(noisy, t, conditions), t)
        square = (drawn - wanted).square().flatten(1)
        loss = ((square + self.config.huber**2).sqrt() - self.config.huber).mean(1)
        return Losses(batch.share(loss), {"mse": batch.share(square.mean(1)).detach()})

    def _solve(self, noisy: Tensor, t: Tensor, earlier: Tensor, conditions: Conditions, empty: Conditions) -> Tensor:
        """Where one step of the teacher's leads."""
        with without_adapters(self.main):
            prediction = self._predict(noisy, t, conditions)
            if empty:
                scale = torch.full((len(t), 1, 1, 1), self.config.guidance, device=noisy.device)
                prediction = self.family.guide(self._predict(noisy, t, empty), prediction, scale)
        start = self.path.denoised(noisy, prediction, t)
        return self.path.add_noise(start, self.path.noise_in(noisy, start, t), earlier)

    def _predict(self, noisy: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """The model's output in fp32, without the variance that some models predict in further channels."""
        with torch.autocast(noisy.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            prediction = self.family.predict(self.main, noisy, t, conditions)
        return prediction[:, : noisy.shape[1]].float()
