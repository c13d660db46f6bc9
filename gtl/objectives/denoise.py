"""Denoising: predict what the model's own noise path asks for, be it noise, velocity or flow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from gtl.config.objectives import Noising
from gtl.diffusion.timesteps import draw_times
from gtl.diffusion.variance import Steps, variance_loss
from gtl.diffusion.weighting import check_min_snr, min_snr
from gtl.types import Batch, Item, Losses

if TYPE_CHECKING:
    from gtl.families.base import DiffusionFamily

CONDITION = "condition."
"""Prefix of the conditions among a batch's tensors."""
TOKEN = "token."
"""Prefix of what the text encoders read, where they run in training."""
STRATA = 4


class Denoise:
    """Denoising diffusion (Ho et al. 2020, arXiv 2006.11239), or flow matching (Lipman et al. 2022, 2210.02747)."""

    def __init__(self, config: Noising, family: DiffusionFamily) -> None:
        """The family's noise path says which of the two.

        Raises:
            UserError: min-SNR weights are asked for a path that has none.
        """
        self.config = config
        self.family = family
        self.path = family.path
        if config.min_snr_gamma is not None:
            check_min_snr(self.path)

    @property
    def parts(self) -> tuple[str, ...]:
        """The denoiser, and the text encoders."""
        return self.family.main, *self.family.encoders

    @property
    def strata(self) -> int:
        """Quarters of the way to noise."""
        return STRATA

    @property
    def judged(self) -> str:
        """The error without min-SNR weights."""
        return "mse"

    def draw(self, item: Item, rng: torch.Generator, stratum: int | None = None) -> dict[str, Tensor]:
        """One sample: clean and noise [C, h, w], t [], and its conditions, or the tokens of an item without embeddings.

        The numbers drawn, and their order, are the same under every setting, so two recipes see the same noise.
        """
        return self._draw(item, rng, stratum)[0]

    def _draw(self, item: Item, rng: torch.Generator, stratum: int | None) -> tuple[dict[str, Tensor], float]:
        """`draw`, and the number in [0, 1] by which conditions are dropped, the lowest first; 1 if none may be."""
        shape = item.latents["mean"].shape
        posterior = torch.randn(shape, generator=rng)
        noise = torch.randn(shape, generator=rng)
        offset = torch.randn(shape[0], 1, 1, generator=rng)
        u = draw_times(self.config.timesteps, 1, rng, self.path)
        chance = float(torch.rand((), generator=rng))
        if stratum is not None:
            u, chance = (stratum + torch.rand(1, generator=rng)) / STRATA, 1.0
        dropped = self._drops_caption(chance)
        moments = {name: value.float()[None] for name, value in item.latents.items()}
        conditions = dict(item.null_conditions if dropped else item.conditions)
        tokens = {} if conditions else self.family.tokenize(["" if dropped else item.caption])[0]
        conditions |= self.family.size_conditions(item.geometry)
        conditions |= self.family.guidance_conditions(1.0)
        clean = self.family.sample_latents(moments, posterior[None])[0]
        conditions |= self.family.picture_conditions(clean, rng)
        return {
            "clean": clean,
            "noise": noise + self.config.offset_noise * offset,
            "t": self.path.time(u)[0],
            **{CONDITION + name: value for name, value in conditions.items()},
            **{TOKEN + name: value for name, value in tokens.items()},
        }, chance

    def _drops_caption(self, chance: float) -> bool:
        return chance < self.config.caption_dropout

    def collate(self, samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Stack draws to a batch; the family pads conditions and tokens."""
        return stack(samples, self.family, (CONDITION, TOKEN))

    def players(self, parts: dict[str, nn.Module], dtype: torch.dtype) -> dict[str, nn.Module]:
        """One player, `denoiser`, over the family's main part and those text encoders that are given.

        What is drawn from now on has the words that these have learned.
        """
        encoders = {name: parts[name] for name in self.family.encoders if name in parts}
        self.family = self.family.reading(encoders)
        return {"denoiser": self.player(parts[self.family.main], encoders, dtype)}

    def player(self, main: nn.Module, encoders: Mapping[str, nn.Module], dtype: torch.dtype) -> Denoiser:
        """See `players`."""
        return Denoiser(main, encoders, self.family, self.config.min_snr_gamma, dtype)


class Denoiser(nn.Module):
    """A model, with the text encoders that run in training, and its denoising loss."""

    def __init__(
        self, main: nn.Module, encoders: Mapping[str, nn.Module], family: DiffusionFamily,
        min_snr_gamma: float | None, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        """Trained weights are fp32 whatever the arithmetic's dtype; other than fp32 it runs under autocast."""
        super().__init__()
        self.main = main
        self.encoders = nn.ModuleDict(encoders)
        self.family = family
        self.path = family.path
        self.min_snr_gamma = min_snr_gamma
        self.dtype = dtype

    def forward(self, batch: Batch) -> Losses:
        """The batch's share of the mean loss; part `mse` is without min-SNR weights, and without a variance's term."""
        loss, mse, _ = self.errors(batch)
        return Losses(batch.share(loss), {"mse": batch.share(mse).detach()})

    def errors(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Of samples the loss [B], the mean squared error alone [B], and the prediction [B, C, h, w] in fp32."""
        clean, noise, t = (batch.tensors[name] for name in ("clean", "noise", "t"))
        noisy, target = self.path.add_noise(clean, noise, t), self.path.target(clean, noise, t)
        with torch.autocast(clean.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            seen = self._seen(noisy, batch.tensors)
            prediction = self.family.predict(self.main, seen, t, self._conditions(batch.tensors))
        # A model that also predicts its variance (arXiv 2102.09672) does so in further channels.
        prediction, share = prediction.float().tensor_split([target.shape[1]], dim=1)
        mse = mean_square(prediction - target)
        loss = mse if self.min_snr_gamma is None else mse * min_snr(self.path, t, self.min_snr_gamma)
        if share.shape[1] and self.path.ranges_variance:
            loss = loss + variance_loss(cast(Steps, self.path), clean, noisy, prediction, share, t)
        return loss, mse, prediction

    def _seen(self, noisy: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        """What the model reads at its input."""
        return noisy

    def _conditions(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tokens = under(TOKEN, tensors)
        encoded = self.family.encode_tokens(dict(self.encoders.items()), tokens) if tokens else {}
        return {**conditions_of(tensors), **encoded}


def mean_square(error: Tensor) -> Tensor:
    """Of each sample, over all else, [B]."""
    return error.square().flatten(1).mean(1)


def stack(
    samples: Sequence[dict[str, Tensor]], family: DiffusionFamily, texts: tuple[str, ...]
) -> dict[str, Tensor]:  # fmt: skip
    """Draws as a batch, [B, ...]; the family pads what is under the prefixes `texts`, each by itself."""
    names = [name for name in samples[0] if not name.startswith(texts)]
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in names}
    for prefix in texts:
        padded = family.collate([under(prefix, sample) for sample in samples])
        batch |= {prefix + name: value for name, value in padded.items()}
    return batch


def conditions_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The conditions among a sample's or a batch's tensors, under the family's own names."""
    return under(CONDITION, tensors)


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with the prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
