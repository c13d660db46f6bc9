"""Distillation into a smaller model: denoising, and being like the teacher in what it puts out and in between."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gtl.config.objectives import DistillObjective
from gtl.families import denoising, open_family
from gtl.objectives.denoise import Denoise, Denoiser, conditions_of, mean_square
from gtl.objectives.features import recorded
from gtl.types import Batch, Losses, UserError

if TYPE_CHECKING:
    from gtl.families.base import DiffusionFamily


class Distill(Denoise):
    """Block-removed knowledge distillation (Kim et al. 2023, arXiv 2305.15798), after FitNets (arXiv 1412.6550)."""

    def __init__(self, config: DistillObjective, family: DiffusionFamily) -> None:
        """No weight is loaded.

        Raises:
            UserError: there is no such teacher, or it sees other latents, prompts or noise than the model does.
        """
        super().__init__(config, family)
        self.settings = config
        found = open_family(
            config.teacher, revision=config.revision, variant=config.variant, weights=not family.configs_only
        )
        self.teacher = denoising(found)
        check_alike(config.teacher, self.teacher, family)

    @property
    def parts(self) -> tuple[str, ...]:
        """The denoiser: what its teacher reads of prompts cannot move."""
        return (self.family.main,)

    def players(self, parts: dict[str, nn.Module], dtype: torch.dtype) -> dict[str, nn.Module]:
        """One player, `student`, over the family's main part and the teacher's.

        Raises:
            UserError: the two have nothing in common.
        """
        main = parts[self.family.main]
        device = next(main.parameters()).device
        # As it is stored, like the parts, which are cast where they are placed; on meta nothing is.
        teacher = self.teacher.load(self.teacher.main, dtype if device.type == "meta" else None, str(device))
        return {"student": Student(main, teacher, self.family, self.settings, dtype)}


class Student(Denoiser):
    """A model with its denoising loss, and a frozen teacher with the distance from it."""

    def __init__(
        self, main: nn.Module, teacher: nn.Module, family: DiffusionFamily, config: DistillObjective, dtype: torch.dtype
    ) -> None:
        """Trained weights are fp32 whatever the arithmetic's dtype; other than fp32 it runs under autocast."""
        super().__init__(main, {}, family, config.min_snr_gamma, dtype)
        self.teacher = teacher.requires_grad_(False)
        self.config = config
        self.counterparts = family.counterparts(main, teacher) if config.features else []
        if config.features and not self.counterparts:
            raise UserError(f"objective.teacher: {config.teacher}: has no section that the model has too")

    def forward(self, batch: Batch) -> Losses:
        """The batch's share of the mean loss; parts `mse`, `output` and `features` are without their weights."""
        mine, theirs = zip(*self.counterparts, strict=True) if self.counterparts else ((), ())
        with recorded(self.main, mine) as features:
            loss, mse, prediction = self.errors(batch)
        with torch.no_grad(), recorded(self.teacher, theirs) as wanted:
            output = mean_square(prediction - self._teach(batch))
        distances = (relative(a.float(), b.float()) for a, b in zip(features, wanted, strict=True))
        distance = sum(distances, torch.zeros_like(output))
        total = self.config.task * loss + self.config.output * output + self.config.features * distance
        parts = {"mse": mse, "output": output, "features": distance}
        return Losses(batch.share(total), {name: batch.share(value).detach() for name, value in parts.items()})

    def _teach(self, batch: Batch) -> Tensor:
        """The teacher's prediction, [B, C, h, w], fp32."""
        clean, noise, t = (batch.tensors[name] for name in ("clean", "noise", "t"))
        noisy = self.path.add_noise(clean, noise, t)
        with torch.autocast(clean.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            prediction = self.family.predict(self.teacher, noisy, t, conditions_of(batch.tensors))
        return prediction[:, : clean.shape[1]].float()


def relative(mine: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared distance of each sample's features from those wanted, in mean squares of the latter, [B]."""
    return mean_square(mine - wanted) / mean_square(wanted).clamp(min=torch.finfo(wanted.dtype).tiny)


def check_alike(source: str, teacher: DiffusionFamily, student: DiffusionFamily) -> None:
    """Refuse a teacher that could not be shown what the student is shown.

    Raises:
        UserError: it is of another family, codec, text encoder or noise.
    """
    where = f"objective.teacher: {source}"
    if teacher.name != student.name:
        raise UserError(f"{where}: is of family {teacher.name}, and model.source of {student.name}")
    shared = [*([student.codec] if student.codec else []), *student.encoders]
    for part in shared:
        if part not in (teacher.codec, *teacher.encoders) or seen(teacher, part) != seen(student, part):
            raise UserError(f"{where}: its {part} is not that of model.source, so it sees other latents or prompts")
    times = student.path.solver_times(4)
    noise = [(family.path.prediction, family.path.snr(times[1:]).tolist()) for family in (teacher, student)]
    if noise[0] != noise[1]:
        raise UserError(f"{where}: predicts another quantity, or of another noise, than model.source does")


def seen(family: DiffusionFamily, part: str) -> str | None:
    """What a part of a model is told from others by; None where only shapes are asked for."""
    return None if family.configs_only else family.fingerprint(part)
