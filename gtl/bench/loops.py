"""Two loops over the same model, data and optimizer: this project's, and the shortest in plain PyTorch."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gtl.data.plan import Plan
from gtl.families import denoising
from gtl.train.assemble import Trainee, assemble
from gtl.train.course import make_loader
from gtl.train.flops import FlopMeter
from gtl.train.loop import Lane, train
from gtl.train.place import place
from gtl.train.track import Tracker
from gtl.train.worker import make_engines, settle
from gtl.types import Batch

if TYPE_CHECKING:
    from gtl.config import Recipe
    from gtl.data.dataset import Dataset
    from gtl.families.base import Conditions


class Ours:
    """`gtl.train.loop.train` as a worker runs it, with its loader, engine and tracker; it saves nothing."""

    def __init__(self, recipe: Recipe, dataset: Dataset, device: torch.device, dtype: str, tracker: Tracker) -> None:
        """Load the model and wrap it. Collective."""
        self._recipe, self._dataset, self._device, self._tracker = recipe, dataset, device, tracker
        self.batches = Plan(dataset.entries, recipe.train.batch_size, recipe.data.seed)
        self.trainee = assemble(recipe, dtype)
        self.plan = settle(recipe, self.trainee.family, device, dtype, self.batches.steps_per_epoch)
        self._engines = make_engines(self.trainee, recipe, self.plan, device)
        self._done = 0
        self.rows: list[dict[str, float]] = []
        """Metrics of the last call, a row a step."""

    def __call__(self, steps: int) -> list[float]:
        """Make steps, from where the last call ended; their losses."""
        self.rows = []
        plan = replace(self.plan, steps=self._done + steps)
        seed, every = self._recipe.train.seed, self._recipe.train.checkpoints.every
        lane = Lane(seed, every, save=lambda step: None, report=self._report, device=self._device, done=self._done)
        data = self._dataset, self.batches, self.trainee, plan, self._recipe.data.seed
        loader = make_loader(*data, self._done, self._device)
        self._done = train(self._engines, loader, lane)
        return [row["loss"] for row in self.rows]

    def _report(self, row: dict[str, float]) -> None:
        self._tracker.log(row)
        self.rows.append(row)

    @property
    def data_wait(self) -> float:
        """Share of the last call's time that passed waiting for data."""
        return statistics.fmean(row["data_wait"] for row in self.rows)


class Bare:
    """What one would write by hand: all data in the device's memory, noise drawn there, no metric but the loss."""

    def __init__(
        self, recipe: Recipe, dataset: Dataset, device: torch.device, dtype: str, lender: Trainee | None = None
    ) -> None:
        """Load the model and the data; what does not move is shared with the lender, which is placed already."""
        trainee = assemble(recipe, dtype)
        if lender is not None:
            borrow(trainee, lender)
        self._family, self._device, self._mixed = denoising(trainee.family), device, dtype == "bf16"
        (player,) = trainee.players.values()
        place(player, trainee.dtype, device)
        self._main: nn.Module = player.get_submodule("main")
        self._parameters = list(trainee.parameters.values())
        self._max_grad_norm = recipe.train.max_grad_norm
        self.batch_size = recipe.train.batch_size
        self._rng = torch.Generator().manual_seed(recipe.data.seed)
        asked = recipe.train.optimizer
        self._optimizer = torch.optim.AdamW(
            self._parameters, recipe.train.learning_rate, betas=asked.betas, eps=asked.eps,
            weight_decay=asked.weight_decay, fused=device.type == "cuda",
        )  # fmt: skip
        items = [dataset.item(entry, 0, 0) for entry in range(len(dataset.entries))]
        self._moments = {
            name: torch.stack([item.latents[name] for item in items]).to(device).float() for name in items[0].latents
        }
        always = self._family.guidance_conditions(1.0)
        conditions = [item.conditions | self._family.size_conditions(item.geometry) | always for item in items]
        self._conditions = {name: value.to(device) for name, value in self._family.collate(conditions).items()}

    def __call__(self, steps: int) -> list[float]:
        """Make steps; their losses."""
        losses = [self.step(*self._draw()) for _ in range(steps)]
        return torch.stack(losses).tolist()

    def step(self, clean: Tensor, noise: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """One optimizer step on latents and noise [B, C, h, w], times [B] and conditions [B, ...]; its loss."""
        loss = self._loss(clean, noise, t, conditions)
        loss.backward()
        self._update()
        return loss.detach()

    def count(self) -> float:
        """Operations that an image needs, forward and backward, without what checkpointing does twice; makes a step."""
        clean, noise, t, conditions = self._draw()
        meter = FlopMeter()
        with meter.forward(Batch({"clean": clean}, t)):
            loss = self._loss(clean, noise, t, conditions)
        with meter.backward():
            loss.backward()
        self._update()
        return meter.take() / self.batch_size

    def _loss(self, clean: Tensor, noise: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        path = self._family.path
        noisy = path.add_noise(clean, noise, t)
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._mixed):
            prediction = self._family.predict(self._main, noisy, t, conditions)
        return nn.functional.mse_loss(prediction.float(), path.target(clean, noise, t))

    def _update(self) -> None:
        if self._max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters, self._max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _draw(self) -> tuple[Tensor, Tensor, Tensor, Conditions]:
        chosen = torch.randint(self._num_images, (self.batch_size,), generator=self._rng).to(self._device)
        moments = {name: values[chosen] for name, values in self._moments.items()}
        clean = self._family.sample_latents(moments, torch.randn_like(moments["mean"]))
        t = self._family.path.time(torch.rand(self.batch_size, device=self._device))
        return clean, torch.randn_like(clean), t, {name: value[chosen] for name, value in self._conditions.items()}

    @property
    def _num_images(self) -> int:
        return len(self._moments["mean"])


def borrow(trainee: Trainee, lender: Trainee) -> None:
    """Let weights that do not move be those of another trainee of the same model: two of FLUX.1 fill a GPU."""
    for name, part in trainee.parts.items():
        theirs = dict(lender.parts[name].named_parameters())
        for key, parameter in part.named_parameters():
            if not parameter.requires_grad:
                parameter.data = theirs[key].data
