"""Step distillation: a student that is, anywhere on the teacher's way, where the teacher comes out at its end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gtl.adapters.apply import adapters_on, without_adapters
from gtl.config.objectives import ConsistencyObjective
from gtl.objectives.denoise import CONDITION, STRATA, conditions_of, stack, under
from gtl.objectives.features import Heads, placed, recorded_each
from gtl.objectives.judge import Judge, Judged, Seen
from gtl.types import Batch, Item, Losses, UserError

if TYPE_CHECKING:
    from gtl.families.base import Conditions, DiffusionFamily

EMPTY = "empty."
"""Prefix of the conditions that the teacher's guidance leads away from."""


class Consistency:
    """Latent consistency distillation (Luo et al. 2023, arXiv 2310.04378; by adapters LCM-LoRA, arXiv 2311.05556).

    Its teacher is the model as it was, and its target the model that learns, without a gradient. Beside that a second
    player may judge what the student draws at once, by what the teacher sees in it (arXiv 2311.17042, 2403.12015).
    """

    def __init__(self, config: ConsistencyObjective, family: DiffusionFamily) -> None:
        """The family's noise path says what a step of the teacher's solver is: DDIM's (arXiv 2010.02502), or Euler's.

        Raises:
            UserError: the teacher cannot take as many steps.
        """
        most = family.path.num_train_timesteps
        for key, steps in (("solver_steps", config.solver_steps), ("adversarial_steps", config.adversarial_steps)):
            if steps > most:
                raise UserError(
                    f"objective.{key}: {steps}: expected at most {most}, the steps that the model was trained on"
                )
        self.config = config
        self.family = family
        self.times = family.path.solver_times(config.solver_steps)
        self.few_times = family.path.solver_times(config.adversarial_steps)[1:]
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
        """One sample: clean and noise [C, h, w], t and the time `earlier` of the teacher's next step [], conditions.

        Where it is judged also the time `drawn_at` [] from which the student draws at once, and the noise `veil` and
        its time `veiled` [] under which the teacher sees that. They come last, so the others are the same without.
        """
        shape, steps = item.latents["mean"].shape, self.config.solver_steps
        posterior, noise = torch.randn(shape, generator=rng), torch.randn(shape, generator=rng)
        u = torch.rand((), generator=rng)
        step = int((u if stratum is None else (stratum + u) / STRATA) * steps)
        moments = {name: value.float()[None] for name, value in item.latents.items()}
        beside = self.family.size_conditions(item.geometry)
        beside |= self.family.guidance_conditions(1.0 if self.family.classifier_free else self.config.guidance)
        empty = {**self.family.unconditional(item.null_conditions), **beside} if self.is_guided else {}
        drawn = {
            "clean": self.family.sample_latents(moments, posterior[None])[0],
            "noise": noise,
            "t": self.times[step + 1],
            "earlier": self.times[step],
            **{CONDITION + name: value for name, value in {**item.conditions, **beside}.items()},
            **{EMPTY + name: value for name, value in empty.items()},
        }
        if self.config.adversarial:
            drawn["drawn_at"] = self.few_times[int(torch.randint(len(self.few_times), (), generator=rng))]
            drawn["veil"] = torch.randn(shape, generator=rng)
            drawn["veiled"] = self.family.path.time(torch.rand((), generator=rng))
        return drawn

    def collate(self, samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Stack draws to a batch; the family pads conditions."""
        return stack(samples, self.family, (CONDITION, EMPTY))

    def players(self, parts: dict[str, nn.Module], dtype: torch.dtype) -> dict[str, nn.Module]:
        """`student`, over the family's main part; and `discriminator`, where one judges what it draws.

        Where the model's own weights move, and no adapters, the teacher is a second copy of it.
        """
        main, teacher = parts[self.family.main], None
        device = next(main.parameters()).device
        if not adapters_on(main) and any(parameter.requires_grad for parameter in main.parameters()):
            # As it is stored, like the parts, which are cast where they are placed; on meta nothing is.
            teacher = self.family.load(self.family.main, dtype if device.type == "meta" else None, str(device))
        student = Student(main, self.family, self.config, dtype, teacher)
        if not self.config.adversarial:
            return {"student": student}
        heads = Heads([width for _, width in student.sections]).to(device)
        judge = Judge(heads, student, dtype, self.config.r1)
        student.heed(judge)
        return {"student": student, "discriminator": judge}


class Student(Judged):
    """A model that learns, its teacher, and how far the one is from where the other leads."""

    def __init__(
        self, main: nn.Module, family: DiffusionFamily, config: ConsistencyObjective, dtype: torch.dtype,
        teacher: nn.Module | None = None,
    ) -> None:  # fmt: skip
        """Trained weights are fp32 whatever the arithmetic's dtype; other than fp32 it runs under autocast.

        The teacher is the main part without its adapters if none is given.
        """
        super().__init__(config.adversarial_after if config.adversarial else None)
        self.main = main
        self.teacher = None if teacher is None else teacher.requires_grad_(False)
        self.family = family
        self.path = family.path
        self.config = config
        self.dtype = dtype
        self.sections = family.sections(main) if config.adversarial else []

    def forward(self, batch: Batch) -> Losses:
        """The batch's share of the mean loss, over the elements of a sample; part `mse` is of the same distance."""
        clean, noise, t, earlier = (batch.tensors[name] for name in ("clean", "noise", "t", "earlier"))
        conditions = conditions_of(batch.tensors)
        noisy = self.path.add_noise(clean, noise, t)
        with torch.no_grad():
            before = self._solve(noisy, t, earlier, conditions, under(EMPTY, batch.tensors))
            wanted = self._at_once(before, earlier, conditions)
        square = (self._at_once(noisy, t, conditions) - wanted).square().flatten(1)
        loss = ((square + self.config.huber**2).sqrt() - self.config.huber).mean(1)
        parts = {"mse": square.mean(1)}
        if self.is_judged and torch.is_grad_enabled():
            parts["adversarial"] = self._unlike(batch)
            loss = loss + self.config.adversarial * parts["adversarial"]
        return Losses(batch.share(loss), {name: batch.share(value).detach() for name, value in parts.items()})

    def drawn(self, batch: Batch) -> Tensor:
        """What the student draws at once, of the batch's latents under so much noise as few steps begin at."""
        clean, noise, t = (batch.tensors[name] for name in ("clean", "noise", "drawn_at"))
        return self._at_once(self.path.add_noise(clean, noise, t), t, conditions_of(batch.tensors))

    def shown(self, batch: Batch) -> tuple[Seen, Seen]:
        """What the teacher sees in the batch's latents, and in what the student draws."""
        return self._seen(batch.tensors["clean"], batch), self._seen(self.drawn(batch), batch)

    def _unlike(self, batch: Batch) -> Tensor:
        """How little what the student draws looks like the data, [B].

        The way back through the teacher is gone at once, while its adapters are off, and with them in a recomputation;
        so both graphs are never there together, and the student's gets the gradient as a number.
        """
        drawn = self.drawn(batch)
        latents = drawn.detach().requires_grad_()
        with self._teaching():
            loss = -self._judge[0].judge(*self._seen(latents, batch))
            (gradient,) = torch.autograd.grad(loss.sum(), latents)
        return loss.detach() + ((drawn - drawn.detach()) * gradient).flatten(1).sum(1)

    def _seen(self, latents: Tensor, batch: Batch) -> Seen:
        """What the teacher's sections put out for latents under noise, [B, places, D] each."""
        veil, t = batch.tensors["veil"], batch.tensors["veiled"]
        names = [name for name, _ in self.sections]
        with self._teaching() as teacher, recorded_each(teacher, names) as outputs:
            self._predict(teacher, self.path.add_noise(latents, veil, t), t, conditions_of(batch.tensors))
        return tuple(placed(found) for found in outputs)

    def _solve(self, noisy: Tensor, t: Tensor, earlier: Tensor, conditions: Conditions, empty: Conditions) -> Tensor:
        """Where one step of the teacher's leads."""
        with self._teaching() as teacher:
            prediction = self._predict(teacher, noisy, t, conditions)
            if empty:
                scale = torch.full((len(t), 1, 1, 1), self.config.guidance, device=noisy.device)
                prediction = self.family.guide(self._predict(teacher, noisy, t, empty), prediction, scale)
        start = self.path.denoised(noisy, prediction, t)
        return self.path.add_noise(start, self.path.noise_in(noisy, start, t), earlier)

    def _at_once(self, noisy: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """Where the student comes out."""
        return self.path.consistent(noisy, self._predict(self.main, noisy, t, conditions), t)

    @contextmanager
    def _teaching(self) -> Iterator[nn.Module]:
        """The teacher, within it."""
        if self.teacher is not None:
            yield self.teacher
        else:
            with without_adapters(self.main):
                yield self.main

    def _predict(self, model: nn.Module, noisy: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """A model's output in fp32, without the variance that some models predict in further channels."""
        with torch.autocast(noisy.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            prediction = self.family.predict(model, noisy, t, conditions)
        return prediction[:, : noisy.shape[1]].float()
