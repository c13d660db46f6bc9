"""Noise paths: how clean data becomes noise, and what a network that learned the way back predicts.

Diffusion (Ho et al. 2020, arXiv 2006.11239) and rectified flow (Liu et al. 2022, arXiv 2209.03003), the same verbs.
Data has shape [B, ...]; times t are in the model's own units, always one per sample, [B].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from gtl.imports import light
from gtl.types import Sampler, UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SIGMA_DATA = 0.5
"""Standard deviation of data, as consistency models take it."""
Prediction = Literal["epsilon", "v_prediction", "sample", "flow"]
"""What the network predicts: the noise, the velocity of Salimans & Ho 2022 (arXiv 2202.00512), clean data, the flow."""


class NoisePath(Protocol):
    """From clean data to noise."""

    prediction: Prediction
    num_train_timesteps: int
    """Times that samplers place their steps among."""
    shift: float
    """Shift towards noise with which the model was trained, see `gtl.config.objectives.Timesteps`; 1 is none."""
    ranges_variance: bool
    """Whether a model predicts, beside, where its variance is between its bounds; see `gtl.diffusion.variance`."""

    def time(self, u: Tensor) -> Tensor:
        """Times of shares u in [0, 1] of the way to noise, in the model's own units; any shape."""
        ...

    def add_noise(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The point of the path at time t."""
        ...

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should predict there."""
        ...

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio, of variances, [B]."""
        ...

    def denoised(self, noisy: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """The clean data that a prediction stands for."""
        ...

    def noise_in(self, noisy: Tensor, clean: Tensor, t: Tensor) -> Tensor:
        """The noise with which clean data is where it is at time t; not finite at the clean end."""
        ...

    def consistent(self, noisy: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """`denoised`, and at the clean end what is there already, whatever is predicted (Song et al. 2023, arXiv
        2303.01469, section 3)."""
        ...

    def solver_times(self, steps: int) -> Tensor:
        """Times between which a solver of so many steps goes, [steps + 1], from clean to noise."""
        ...


class VariancePreserving:
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise, at whole steps t in [0, T)."""

    shift = 1.0

    def __init__(
        self, alphas_cumprod: Tensor, prediction: Prediction = "epsilon", ranges_variance: bool = False
    ) -> None:  # fmt: skip
        """`alphas_cumprod` [T] are the a_t."""
        self.ranges_variance = ranges_variance
        self.alphas_cumprod = alphas_cumprod
        self.num_train_timesteps = len(alphas_cumprod)
        self.prediction: Prediction = prediction
        self._on_device: dict[torch.device, Tensor] = {}

    def time(self, u: Tensor) -> Tensor:
        """Whole steps, each for an equal share of [0, 1)."""
        num = self.num_train_timesteps
        return (u * num).long().clamp_(0, num - 1)

    def add_noise(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The point of the path at time t."""
        signal, sigma = self._coefficients(t, clean)
        return signal * clean + sigma * noise

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Noise, velocity or clean data."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return clean
        signal, sigma = self._coefficients(t, clean)
        return signal * noise - sigma * clean

    def snr(self, t: Tensor) -> Tensor:
        """a_t / (1 - a_t)."""
        alpha = self.alphas(t)
        return alpha / (1 - alpha)

    def denoised(self, noisy: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """The clean data that a prediction stands for; not finite for epsilon at zero signal."""
        if self.prediction == "sample":
            return prediction
        signal, sigma = self._coefficients(t, noisy)
        if self.prediction == "epsilon":
            return (noisy - sigma * prediction) / signal
        return signal * noisy - sigma * prediction

    def noise_in(self, noisy: Tensor, clean: Tensor, t: Tensor) -> Tensor:
        """(x_t - sqrt(a_t) x_0) / sqrt(1 - a_t)."""
        signal, sigma = self._coefficients(t, noisy)
        return (noisy - signal * clean) / sigma

    def consistent(self, noisy: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """Both, weighted as diffusers' LCMScheduler does; but for the first few times all is `denoised`."""
        scaled = (10.0 * t).to(noisy.dtype).view(-1, *[1] * (noisy.ndim - 1))
        norm = scaled**2 + SIGMA_DATA**2
        return SIGMA_DATA**2 / norm * noisy + scaled / norm.sqrt() * self.denoised(noisy, prediction, t)

    def solver_times(self, steps: int) -> Tensor:
        """The last of each of so many equal shares of the steps, and the first of all.

        They are those of LCMScheduler, which leaves out the noisiest where the shares are not whole.
        """
        import torch

        ends = torch.arange(1, steps + 1) * (self.num_train_timesteps - 1) // steps
        return torch.cat([torch.zeros(1, dtype=torch.long), ends])

    def __getstate__(self) -> dict[str, Any]:
        """Without the copies on devices."""
        return {**self.__dict__, "_on_device": {}}

    def alphas(self, t: Tensor) -> Tensor:
        """The a_t at these steps."""
        # A copy per device: copying the table in every step would make the GPU wait.
        if t.device not in self._on_device:
            self._on_device[t.device] = self.alphas_cumprod.to(t.device)
        return self._on_device[t.device][t]

    def _coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        alpha = self.alphas(t)
        shape = (-1, *[1] * (like.ndim - 1))
        return (alpha**0.5).to(like.dtype).view(shape), ((1 - alpha) ** 0.5).to(like.dtype).view(shape)


class RectifiedFlow:
    """x_t = (1 - s) x_0 + s noise with s = t / T in [0, 1]; the network predicts noise - x_0."""

    prediction: Prediction = "flow"
    ranges_variance = False

    def __init__(self, shift: float = 1.0, num_train_timesteps: int = 1000) -> None:
        """T is `num_train_timesteps`."""
        self.shift = shift
        self.num_train_timesteps = num_train_timesteps

    def time(self, u: Tensor) -> Tensor:
        """T u."""
        return u * self.num_train_timesteps

    def add_noise(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The point of the path at time t."""
        share = self._share(t, clean)
        return (1 - share) * clean + share * noise

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The flow, the same at all times."""
        return noise - clean

    def snr(self, t: Tensor) -> Tensor:
        """((1 - s) / s)^2."""
        share = t / self.num_train_timesteps
        return ((1 - share) / share) ** 2

    def denoised(self, noisy: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """Back along the flow."""
        return noisy - self._share(t, noisy) * prediction

    def noise_in(self, noisy: Tensor, clean: Tensor, t: Tensor) -> Tensor:
        """(x_t - (1 - s) x_0) / s."""
        share = self._share(t, noisy)
        return (noisy - (1 - share) * clean) / share

    def consistent(self, noisy: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """`denoised`, which is just that at s = 0."""
        return self.denoised(noisy, prediction, t)

    def solver_times(self, steps: int) -> Tensor:
        """In equal shares, shifted towards noise as the model is."""
        import torch

        u = torch.linspace(0, 1, steps + 1)
        return self.time(self.shift * u / (1 + (self.shift - 1) * u))

    def _share(self, t: Tensor, like: Tensor) -> Tensor:
        return (t / self.num_train_timesteps).to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def path_of(config: Mapping[str, Any]) -> NoisePath:
    """The path that a diffusers scheduler config describes; a key that it lacks has its scheduler's own default.

    Raises:
        UserError: the scheduler or its prediction type is unknown.
    """
    resolved = make_scheduler(config).config
    if "FlowMatch" in config["_class_name"] or resolved.get("use_flow_sigmas"):
        return RectifiedFlow(_flow_shift(resolved), resolved["num_train_timesteps"])
    if "beta_schedule" not in resolved:
        # Such as EDM's (Karras et al. 2022, arXiv 2206.00364), which also scales what goes in and comes out.
        name = config["_class_name"]
        raise UserError(f"scheduler_config.json: _class_name: {name!r}: has no table of betas, and is not supported")
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    prediction = resolved.get("prediction_type", "epsilon")
    if prediction not in get_args(Prediction) or prediction == "flow":
        raise UserError(
            f"scheduler_config.json: prediction_type: {prediction!r}: epsilon, v_prediction and sample are supported"
        )
    keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
    # DDPM's table, since some samplers change theirs to keep their own arithmetic finite.
    ddpm = DDPMScheduler(**{key: resolved[key] for key in keys if key in resolved})
    return VariancePreserving(ddpm.alphas_cumprod, prediction, resolved.get("variance_type") == "learned_range")


def make_scheduler(config: Mapping[str, Any]) -> Any:
    """The diffusers scheduler that a scheduler config names, fresh.

    Raises:
        UserError: diffusers has none of this name.
    """
    with light():
        import diffusers

    name = str(config.get("_class_name"))
    scheduler = getattr(diffusers, name, None) if "Scheduler" in name else None
    if scheduler is None:
        version = diffusers.__version__
        raise UserError(f"scheduler_config.json: _class_name: {name!r}: diffusers {version} has no such scheduler")
    try:
        return scheduler.from_config(dict(config))
    except (TypeError, ValueError, NotImplementedError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"scheduler_config.json: not one that a {name} can be made of: {reason}") from error


def sampler_config(config: Mapping[str, Any], kind: Sampler) -> dict[str, Any]:
    """The config of a scheduler for a model whose own has this config.

    That for consistency models goes the same noise path: it predicts clean data, and adds new noise as far as the next
    time (arXiv 2303.01469, algorithm 1).
    """
    if kind == "model":
        return dict(config)
    resolved = make_scheduler(config).config
    path = path_of(config)
    if isinstance(path, RectifiedFlow):
        shift = {} if resolved.get("use_dynamic_shifting") else {"shift": path.shift}
        return {**config, "_class_name": "FlowMatchLCMScheduler", **shift}
    # What is clipped, and which steps are taken, is a matter of the sampler that this one takes the place of.
    shared = ("beta", "num_", "prediction", "trained", "rescale")
    own = {key: value for key, value in config.items() if key.startswith(shared)}
    return {**own, "_class_name": "LCMScheduler"}


def _flow_shift(config: Mapping[str, Any]) -> float:
    """A model whose shift grows with the image was made for the size at which it is greatest."""
    if not config.get("use_dynamic_shifting"):
        return float(config["shift"] if "shift" in config else config["flow_shift"])
    greatest = float(config["max_shift"])
    return math.exp(greatest) if config.get("time_shift_type", "exponential") == "exponential" else greatest
