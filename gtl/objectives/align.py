"""Domain adaptation: denoising, with features half-way through the model in which two domains can't be told apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from gtl.config.objectives import AlignObjective
from gtl.objectives.denoise import Denoise, Denoiser
from gtl.objectives.features import pooled, recorded
from gtl.types import Batch, Item, Losses, UserError

if TYPE_CHECKING:
    from gtl.families.base import DiffusionFamily

TARGET = "target"
"""Among a batch's tensors: 1 for a sample of the target domain, 0 for one of the source domain."""
HIDDEN = 256
"""Width of the network that tells the domains apart."""
STEEPNESS = 10.0
"""Of how the reversed gradient rises (Ganin et al. 2016, arXiv 1505.07818, section 5.2.2)."""
BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Of the kernels, in mean squared distances of two samples."""


class Align(Denoise):
    """Denoising of two domains at once, and a term for how far their features are apart."""

    def __init__(self, config: AlignObjective, family: DiffusionFamily) -> None:
        """See `Denoise`."""
        super().__init__(config, family)
        self.settings = config

    def draw(self, item: Item, rng: torch.Generator, stratum: int | None = None) -> dict[str, Tensor]:
        """As in denoising, with the sample's domain."""
        return {**super().draw(item, rng, stratum), TARGET: torch.tensor(float(item.is_target))}

    def player(self, main: nn.Module, encoders: Mapping[str, nn.Module], dtype: torch.dtype) -> Denoiser:
        """A denoiser that is told how far its domains are apart."""
        return Aligned(main, encoders, self.family, self.settings, dtype)


class Aligned(Denoiser):
    """A model with its denoising loss, and a second term that is small when its domains look alike half-way through.

    `dann` has a loss for every sample, so it depends on nothing but the global batch. `mmd` and `coral` are statistics
    of several samples: they are taken of each forward pass by itself, and their mean, by the weight of its samples,
    is the step's. So they depend on train.micro_batch, and not on which worker runs which of the forward passes. One
    that has fewer than two samples of a domain, at the end of an epoch, has no such term.
    """

    passed: Tensor

    def __init__(
        self, main: nn.Module, encoders: Mapping[str, nn.Module], family: DiffusionFamily, config: AlignObjective,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        """See `Denoiser`. The network that tells the domains apart begins with the same weights in every run."""
        super().__init__(main, encoders, family, config.min_snr_gamma, dtype)
        self.config = config
        self.middle, width = family.middle(main)
        self.critic = critic(width, next(main.parameters()).device) if config.method == "dann" else None
        self.register_buffer("passed", torch.tensor([0, 1]))
        """Steps made, and those of the whole run."""

    @property
    def reversal(self) -> Tensor:
        """lambda of the reversed gradient, [], rising from 0 to the weight."""
        share = (self.passed[0] / self.passed[1]).clamp(max=1)
        return self.config.weight * (2 / (1 + (-STEEPNESS * share).exp()) - 1)

    def forward(self, batch: Batch) -> Losses:
        """The batch's share of the mean loss; part `domain` is how far the domains are apart, without its weight.

        Raises:
            UserError: nothing that moves is in front of the features.
        """
        with recorded(self.main, (self.middle,)) as outputs:
            loss, mse, _ = self.errors(batch)
        features = pooled(outputs)
        if torch.is_grad_enabled() and not features.requires_grad:
            raise UserError(
                f"tuner.freeze_depth: nothing that moves is in front of {self.middle}, where objective.type: align "
                "compares the domains; freeze less"
            )
        if self.critic is not None:
            logits = self.critic(Reversal.apply(features, self.reversal)).squeeze(1)
            apart = batch.share(binary_cross_entropy_with_logits(logits, batch.tensors[TARGET], reduction="none"))
            total = batch.share(loss) + apart
        else:
            counted = (batch.weight > 0).float()
            target = batch.tensors[TARGET] * counted
            distance = {"mmd": mmd, "coral": coral}[self.config.method]
            apart = batch.weight.sum() * distance(features, counted - target, target)
            total = batch.share(loss) + self.config.weight * apart
        return Losses(total, {"mse": batch.share(mse).detach(), "domain": apart.detach()})

    def after_step(self, done: int, total: int) -> None:
        """Let the reversed gradient follow the run."""
        self.passed.copy_(torch.tensor([done, total]))


class Reversal(torch.autograd.Function):
    """The identity, whose gradient is turned round and scaled (Ganin et al. 2016, arXiv 1505.07818, equation 18)."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, scale: Tensor) -> Tensor:
        """The features, of any shape; the scale is a scalar."""
        ctx.save_for_backward(scale)
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """- scale * gradient."""
        (scale,) = ctx.saved_tensors
        return -scale * gradients[0], None


def critic(width: int, device: torch.device) -> nn.Sequential:
    """A small network from features [B, width] to logits [B, 1], above 0 for the target domain."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        network = nn.Sequential(nn.Linear(width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))
    return network.to_empty(device=device) if device.type == "meta" else network.to(device)


def mmd(features: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of two samples, unbiased (Gretton et al. 2012, JMLR 13, equation 3).

    Its kernel is the mean of Gaussian ones, exp(-d^2 / b), with b around the mean squared distance d^2, through which
    no gradient goes (Long et al. 2015, arXiv 1502.02791).

    Args:
        features: [B, D].
        source: [B], 1 for those of the first sample and 0 for others.
        target: The same of the second.

    Returns:
        A scalar; 0 where one of the two has fewer than two members.
    """
    square = (features[:, None] - features[None]).square().sum(2)
    other = 1 - torch.eye(len(features), device=features.device)
    counted = source + target
    pairs = counted[:, None] * counted[None] * other
    unit = mean(square, pairs).detach().clamp(min=1e-12)
    kernel = torch.stack([(-square / (unit * each)).exp() for each in BANDWIDTHS]).mean(0)
    within = [mean(kernel, each[:, None] * each[None] * other) for each in (source, target)]
    between = mean(kernel, source[:, None] * target[None])
    return where_two(within[0] + within[1] - 2 * between, source, target)


def coral(features: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Squared distance of two samples' covariances, over 4 D^2 (Sun & Saenko 2016, arXiv 1607.01719, equation 1).

    For the arguments and where it is 0 see `mmd`.
    """
    one, two = (covariance(features, each) for each in (source, target))
    return where_two((one - two).square().sum() / (4 * features.shape[1] ** 2), source, target)


def covariance(features: Tensor, counted: Tensor) -> Tensor:
    """Of the counted rows of features [B, D], unbiased, [D, D]."""
    rows = (features - mean(features, counted[:, None].expand_as(features), 0)) * counted[:, None]
    return rows.mT @ rows / (counted.sum() - 1).clamp(min=1)


def mean(values: Tensor, weight: Tensor, *dims: int) -> Tensor:
    """Weighted mean over some dimensions, or all; 0 where there is no weight."""
    return (values * weight).sum(dims) / weight.sum(dims).clamp(min=1)


def where_two(distance: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """A distance of two samples if both have at least two members, else 0."""
    return torch.where(torch.minimum(source.sum(), target.sum()) >= 2, distance, torch.zeros_like(distance))
