"""Adversarial learning: a generator draws what a discriminator can't tell from the data (arXiv 1406.2661)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import relu, softplus

from gtl.config.objectives import AdversarialObjective, Augmentation
from gtl.objectives.augment import LOTS, augment
from gtl.types import Batch, Item, Losses

if TYPE_CHECKING:
    from gtl.families.base import NoiseFamily

SPREAD, REAL_SPREAD = "spread", "spread_real"
"""Parts of the discriminator's losses: mean distance of two drawn pictures of a batch, and of two real ones."""


class Adversarial:
    """Two players: in every step the discriminator has its turn first."""

    def __init__(self, config: AdversarialObjective, family: NoiseFamily) -> None:
        """Nothing is loaded."""
        self.config = config
        self.family = family

    @property
    def parts(self) -> tuple[str, ...]:
        """The generator and the discriminator."""
        return self.family.main, *self.family.critics

    @property
    def strata(self) -> int:
        """There is no time."""
        return 1

    @property
    def judged(self) -> None:
        """Nothing: how either loss stands depends on how good the other player is."""
        return None

    def draw(self, item: Item, rng: torch.Generator, stratum: int | None = None) -> dict[str, Tensor]:
        """One sample: pixels [3, H, W] in [-1, 1], noise [2, n] and lots [3, LOTS].

        The noise is that of both turns; the lots are of the real picture, and of those that are drawn in both turns.
        """
        assert item.pixels is not None
        return {
            "pixels": item.pixels.float().div(127.5).sub(1),
            "noise": torch.randn(2, self.family.noise_size, generator=rng),
            "lots": torch.rand(3, LOTS, generator=rng),
            "between": torch.rand((), generator=rng),
        }

    def collate(self, samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Stack draws to a batch."""
        return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}

    def players(self, parts: dict[str, nn.Module], dtype: torch.dtype) -> dict[str, nn.Module]:
        """`discriminator` and `generator`, in the order of their turns."""
        generator, (critic,) = parts[self.family.main], self.family.critics
        judge = Discriminator(parts[critic], generator, self.config, dtype)
        return {"discriminator": judge, "generator": Generator(generator, judge, self.config, dtype)}


class Discriminator(nn.Module):
    """Tells real pictures from drawn ones."""

    raised: Tensor

    def __init__(
        self, network: nn.Module, generator: nn.Module, config: AdversarialObjective, dtype: torch.dtype
    ) -> None:
        """Trained weights are fp32 whatever the arithmetic's dtype; other than fp32 it runs under autocast."""
        super().__init__()
        self.network = network
        self.config = config
        self.dtype = dtype
        self._generator = (generator,)  # not as a submodule, which this player's engine would take for its own
        self._certain = torch.zeros(2, dtype=torch.float64)
        """Sum of the signs of real pictures' logits since the last step, and their number."""
        self.register_buffer("raised", torch.zeros((), dtype=torch.long))
        """Of an adaptive probability: images that it rose in, less those that it fell in."""

    @property
    def probability(self) -> Tensor | float:
        """Of each kind of augmentation."""
        asked = self.config.augmentation
        if asked is None:
            return 0.0
        return self.raised / asked.images if asked.probability == "adaptive" else asked.probability

    def forward(self, batch: Batch) -> Losses:
        """The batch's share of the mean loss; parts say how it comes about."""
        real, noise, lots = (batch.tensors[name] for name in ("pixels", "noise", "lots"))
        with torch.no_grad(), autocast(real, self.dtype):
            drawn = self._generator[0](noise[:, 0]).float()
        if self.config.r1:
            real = real.detach().requires_grad_()
        seen = [self.augmented(real, lots[:, 0]), self.augmented(drawn, lots[:, 1])]
        if self.config.gradient_penalty:
            share = batch.tensors["between"].view(-1, 1, 1, 1)
            seen.append(torch.lerp(seen[0].detach(), seen[1].detach(), share).requires_grad_())
        with autocast(real, self.dtype):
            logits = self.network(torch.cat(seen)).float()  # in one pass, as an engine's gradients need it
        of_real, of_drawn = logits[: len(real)], logits[len(real) : 2 * len(real)]
        loss = critic_loss(self.config.loss, of_real, of_drawn)
        parts = {"real_logit": of_real, "drawn_logit": of_drawn, "augmentation": self.probability + 0 * of_real}
        parts |= {SPREAD: distances(drawn, batch.weight), REAL_SPREAD: distances(real, batch.weight)}
        if self.config.r1:
            parts["r1"] = slope(of_real, real)
            loss = loss + self.config.r1 / 2 * parts["r1"]
        if self.config.gradient_penalty:
            parts["gradient_penalty"] = (slope(logits[2 * len(real) :], seen[2]).sqrt() - 1).square()
            loss = loss + self.config.gradient_penalty * parts["gradient_penalty"]
        with torch.no_grad():
            counted = (batch.weight > 0).double()
            self._certain = self._certain + torch.stack([(of_real.sign() * counted).sum(), counted.sum()]).cpu()
        return Losses(batch.share(loss), {name: batch.share(value).detach() for name, value in parts.items()})

    def augmented(self, pixels: Tensor, lots: Tensor) -> Tensor:
        """Pictures as the network is to see them."""
        asked = self.config.augmentation
        return pixels if asked is None else augment(pixels, lots, asked.kinds, self.probability)

    def judge(self, drawn: Tensor, lots: Tensor) -> Tensor:
        """Logits [B] of drawn pictures, differentiable in them and not in the weights.

        On copies that share nothing with the engine of this player: its hooks take no notice, and power iterations of
        its spectra are not counted.
        """
        tensors = {name: parameter.detach() for name, parameter in self.network.named_parameters()}
        tensors |= {name: buffer.clone() for name, buffer in self.network.named_buffers()}
        logits: Tensor = functional_call(self.network, tensors, (self.augmented(drawn, lots),))
        return logits

    def after_step(self, done: int, total: int) -> None:
        """Let an adaptive probability follow how certain the network was of all ranks' real pictures. Collective."""
        asked, certain = self.config.augmentation, self._certain.to(self.raised.device)
        self._certain = torch.zeros(2, dtype=torch.float64)
        if asked is not None and asked.probability == "adaptive":
            dist.all_reduce(certain)
            self.raised.copy_(follow(self.raised, certain[0] / certain[1], certain[1].long(), asked))


class Generator(nn.Module):
    """Draws pictures that look real to the discriminator."""

    def __init__(
        self, network: nn.Module, judge: Discriminator, config: AdversarialObjective, dtype: torch.dtype
    ) -> None:
        """See `Discriminator`."""
        super().__init__()
        self.network = network
        self.config = config
        self.dtype = dtype
        self._judge = (judge,)  # not as a submodule, which this player's engine would take for its own

    def forward(self, batch: Batch) -> Losses:
        """The batch's share of the mean loss."""
        noise, lots = batch.tensors["noise"], batch.tensors["lots"]
        with autocast(noise, self.dtype):
            drawn = self.network(noise[:, 1])
            logits = self._judge[0].judge(drawn, lots[:, 2]).float()
        loss = softplus(-logits) if self.config.loss == "bce" else -logits
        return Losses(batch.share(loss), {})


def critic_loss(kind: str, real: Tensor, drawn: Tensor) -> Tensor:
    """A discriminator's loss of each pair of logits, [B]; see `AdversarialObjective.loss`."""
    if kind == "bce":
        return softplus(-real) + softplus(drawn)
    if kind == "hinge":
        return relu(1 - real) + relu(1 + drawn)
    return drawn - real


def slope(logits: Tensor, pixels: Tensor) -> Tensor:
    """Squared norm of the gradient of each logit in its picture, [B]; differentiable in the weights."""
    (gradient,) = torch.autograd.grad(logits.sum(), pixels, create_graph=True)
    return gradient.square().flatten(1).sum(1)


def follow(raised: Tensor, certainty: Tensor, images: Tensor, asked: Augmentation) -> Tensor:
    """`Discriminator.raised` after so many more images: up where the discriminator is more certain than asked for."""
    return (raised + torch.sign(certainty - asked.target).long() * images).clamp(0, asked.images)


def distances(pixels: Tensor, weight: Tensor) -> Tensor:
    """Mean distance of each picture from the others that count, [B]; 0 where there are none."""
    with torch.no_grad():
        rows = pixels.float().flatten(1)
        counts = weight > 0
        pairs = (counts[:, None] & counts[None]).fill_diagonal_(False)
        return (torch.cdist(rows, rows) * pairs).sum(1) / pairs.sum(1).clamp(min=1)


def autocast(like: Tensor, dtype: torch.dtype) -> torch.autocast:
    """Arithmetic in a dtype where a tensor is."""
    return torch.autocast(like.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
