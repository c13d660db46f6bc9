"""The variance that some models predict beside the noise (Nichol & Dhariwal 2021, arXiv 2102.09672).

Its logarithm is a share between two bounds: that of the true posterior, and that of the step forward. The error of the
noise says nothing of it, so it has a loss of its own.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from torch import Tensor

WEIGHT = 1e-3
"""Of the variational bound beside the mean squared error: lambda of section 3.3."""
HALF = 1 / 255
"""Half of the distance between two 8-bit values in [-1, 1]."""


class Steps(Protocol):
    """A path in whole steps."""

    num_train_timesteps: int

    def alphas(self, t: Tensor) -> Tensor:
        """Those of the table at these steps."""
        ...

    def denoised(self, noisy: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """The clean data that a prediction stands for."""
        ...


def variance_loss(path: Steps, clean: Tensor, noisy: Tensor, prediction: Tensor, share: Tensor, t: Tensor) -> Tensor:
    """What a sample adds to the mean squared error of its noise, [B], so that the predicted variance is right.

    lambda T times the term of the variational bound at step t, in bits a dimension: the divergence of the predicted
    step back from the true one, and at step 0 how unlikely 8-bit data are. The mean's gradient is stopped: the noise is
    learned by its own error alone.

    Args:
        path: The noise path.
        clean: [B, C, h, w], as are the next three.
        noisy: At step t.
        prediction: Of the model, such as the noise.
        share: Beside it: -1 is the lower bound of the log-variance, 1 the upper one.
        t: Whole steps, [B].
    """
    shape = (-1, *[1] * (clean.ndim - 1))
    now = path.alphas(t).view(shape)
    is_last = (t == 0).view(shape)
    before = path.alphas((t - 1).clamp(min=0)).view(shape).masked_fill(is_last, 1.0)
    beta = 1 - now / before
    # The last step back has no width; its lower bound is that of the one before.
    zero, one = (path.alphas(torch.full_like(t, step)).view(shape) for step in (0, 1))
    narrowest = (1 - zero) / (1 - one) * (1 - one / zero)
    posterior = torch.where(is_last, narrowest, (1 - before) / (1 - now) * beta)
    upper, lower = beta.log(), posterior.log()
    share = (share + 1) / 2
    log_variance = share * upper + (1 - share) * lower
    # Both means are of the same noisy data, and differ by what the clean data are taken to be.
    to_clean, to_noisy = before.sqrt() * beta / (1 - now), (now / before).sqrt() * (1 - before) / (1 - now)
    guess = path.denoised(noisy, prediction.detach(), t)
    off = to_clean * (clean - guess)
    divergence = 0.5 * (log_variance - lower + (lower - log_variance).exp() - 1 + off**2 * (-log_variance).exp())
    unlikely = -log_likelihood(clean, to_clean * guess + to_noisy * noisy, log_variance)
    nats = torch.where(is_last, unlikely, divergence)
    return WEIGHT * path.num_train_timesteps * nats.flatten(1).mean(1) / math.log(2)


def log_likelihood(data: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Of 8-bit data in [-1, 1] under a normal distribution: that of the interval around each value (arXiv 2006.11239,
    equation 13), the outermost ones without an end."""
    from torch.special import log_ndtr, ndtr

    scale = (-0.5 * log_variance).exp()
    above, below = (data - mean + HALF) * scale, (data - mean - HALF) * scale
    inside = (ndtr(above) - ndtr(below)).clamp(min=1e-12).log()
    return torch.where(data < -0.999, log_ndtr(above), torch.where(data > 0.999, log_ndtr(-below), inside))
