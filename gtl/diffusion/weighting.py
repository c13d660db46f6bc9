"""Loss weights by time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gtl.types import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from gtl.diffusion.path import NoisePath


def check_min_snr(path: NoisePath) -> None:
    """Refuse min-SNR weights where they mean nothing.

    Raises:
        UserError: the model learned a flow, whose loss is weighted by the distribution of its times.
    """
    if path.prediction == "flow":
        raise UserError(
            "objective.min_snr_gamma: the model was trained by flow matching, which has no such weight; "
            "leave it out and set objective.timesteps"
        )


def min_snr(path: NoisePath, t: Tensor, gamma: float) -> Tensor:
    """Weights [B] that count as min(SNR, gamma) on clean data (Hang et al. 2023, arXiv 2303.09556, section 3.4).

    min(SNR, gamma) / SNR for noise, / (SNR + 1) for velocity, / 1 for clean data.
    """
    check_min_snr(path)
    snr = path.snr(t)
    if path.prediction == "epsilon":
        return (gamma / snr).clamp(max=1)  # 1 at zero signal, where min(SNR, gamma) / SNR would be 0 / 0
    return snr.clamp(max=gamma) / (snr + 1 if path.prediction == "v_prediction" else 1)
