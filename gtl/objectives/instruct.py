"""Editing by instructions: denoise an edit, seeing the image that it is an edit of (Brooks et al. 2023, arXiv
2211.09800)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gtl.config.objectives import InstructObjective
from gtl.families.wide import widen
from gtl.objectives.denoise import Denoise, Denoiser
from gtl.types import Item

if TYPE_CHECKING:
    from gtl.families.base import DiffusionFamily

ORIGINAL = "original"
"""What the model sees of the image, among a batch's tensors."""


def show_originals(family: DiffusionFamily, main: nn.Module) -> None:
    """Let a network see an image that it is to edit, beside its latents and in as many channels."""
    if family.input_layer is not None:  # else the objective is refused
        widen(main, family.input_layer, family.latent_shape(*family.default_size)[0])


class Instruct(Denoise):
    """Denoising with the image's latents beside the noisy ones."""

    def __init__(self, config: InstructObjective, family: DiffusionFamily) -> None:
        """The family's network can be given further channels."""
        super().__init__(config, family)
        # Of the chances from 0 to 1 the lowest drop the image, the next both, the next the caption.
        self._image_alone = config.image_dropout
        self._image = self._image_alone + config.both_dropout
        self._caption = self._image + config.caption_dropout

    def player(self, main: nn.Module, encoders: Mapping[str, nn.Module], dtype: torch.dtype) -> Denoiser:
        """A denoiser that sees the image."""
        return Editor(main, encoders, self.family, self.config.min_snr_gamma, dtype)

    def draw(self, item: Item, rng: torch.Generator, stratum: int | None = None) -> dict[str, Tensor]:
        """As `Denoise.draw`, and `original` [C, h, w]: the mean of the image's latents, unscaled, as diffusers has it;
        zeros where it is dropped."""
        sample, chance = self._draw(item, rng, stratum)
        assert item.original is not None
        mean = item.original["mean"].float()
        sample[ORIGINAL] = torch.zeros_like(mean) if chance < self._image else mean
        return sample

    def _drops_caption(self, chance: float) -> bool:
        return self._image_alone <= chance < self._caption


class Editor(Denoiser):
    """A denoiser that sees the image which its sample is an edit of."""

    def _seen(self, noisy: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        return torch.cat([noisy, tensors[ORIGINAL]], dim=1)
