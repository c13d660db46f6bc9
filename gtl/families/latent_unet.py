"""What latent diffusion models with a cross-attending UNet share (Rombach et al. 2021, arXiv 2112.10752)."""

from __future__ import annotations

import json
from abc import ABC
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from gtl.families.base import Conditions
from gtl.families.files import INDEX, read_json
from gtl.families.latent import LatentDiffusion
from gtl.families.targets import CROSS, find_targets
from gtl.families.unet import unet_blocks, unet_cross_attentions, unet_embedders, unet_sections

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gtl.types import Sampler


class LatentUNet(LatentDiffusion, ABC):
    """A UNet over the latents of a VAE, with CLIP text encoders; predicts noise or velocity."""

    main: ClassVar[str] = "unet"
    learns: ClassVar[tuple[str, ...]] = (*LatentDiffusion.learns, "instruct")
    input_layer: str | None = "conv_in"
    editor: ClassVar[str]
    """The class that diffusers has for those whose network sees an image that is to be edited."""
    corrections: ClassVar[Mapping[str, Any]] = {}
    """Keys of early scheduler configs that the family's pipeline in diffusers replaces."""

    def blocks(self, main: nn.Module) -> list[tuple[str, ...]]:
        """Every ResNet and every transformer block of the UNet in execution order."""
        return unet_blocks(main)

    def counterparts(self, main: nn.Module, larger: nn.Module) -> list[tuple[str, str]]:
        """The sections, down, middle and up: each works at the same resolution in both (arXiv 2305.15798)."""
        theirs = set(unet_sections(larger))
        return [(name, name) for name in unet_sections(main) if name in theirs]

    def middle(self, main: nn.Module) -> tuple[str, int]:
        """The middle section, or without one the last on the way down; as wide as the lowest resolution."""
        *_, lowest = (name for name in unet_sections(main) if not name.startswith("up_blocks"))
        return lowest, int(self.config("unet")["block_out_channels"][-1])

    def sections(self, main: nn.Module) -> list[tuple[str, int]]:
        """Down, middle and up; as wide as their resolution."""
        widths = [int(width) for width in self.config("unet")["block_out_channels"]]
        levels = {"down_blocks": widths, "up_blocks": widths[::-1], "mid_block": widths[-1:]}
        split = [(name, *name.partition(".")[::2]) for name in unet_sections(main)]
        return [(name, levels[side][int(level or 0)]) for name, side, level in split]

    def embedders(self, main: nn.Module) -> tuple[str, ...]:
        """The input convolution and the time embedding."""
        return unet_embedders(main)

    def lora_targets(self, main: nn.Module, targets: str | Sequence[str]) -> list[str]:
        """Full names of the layers that a target set names, in order."""
        return find_targets(main, self.embedders(main), self.blocks(main), targets, CROSS)

    def cross_attentions(self, main: nn.Module) -> tuple[str, ...]:
        """The second attention of every transformer block."""
        return unet_cross_attentions(main)

    @property
    def multiple(self) -> int:
        """The VAE's scale times the UNet's own, so that every level of the UNet halves exactly."""
        return self.latent_scale * int(2 ** (self.levels("unet") - 1))

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels the model was made for."""
        size = self.config("unet").get("sample_size") or 64
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.latent_scale, width * self.latent_scale

    def predict(self, main: nn.Module, noisy: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """The UNet's raw output for noisy latents [B, C, h, w] at steps t [B]."""
        prediction: Tensor = main(noisy, t, **conditions, return_dict=False)[0]
        return prediction

    def export(self, parts: Mapping[str, nn.Module], folder: Path) -> None:
        """Write a full diffusers-layout model; of a network that sees an image to edit, one of the class for those."""
        from gtl.families.wide import settle

        is_editor = self.main in parts and settle(parts[self.main])
        super().export(parts, folder)
        if is_editor:
            index = {**read_json(folder / INDEX), "_class_name": self.editor}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def sampler(self, steps: int, height: int, width: int, kind: Sampler = "model") -> Any:
        """A fresh diffusers scheduler with its timesteps set."""
        from gtl.diffusion.path import make_scheduler, sampler_config

        config = sampler_config(self.scheduler_config, kind)
        resolved = make_scheduler(config).config
        corrected = {key: value for key, value in self.corrections.items() if key in resolved}
        scheduler = make_scheduler({**config, **corrected})
        scheduler.set_timesteps(steps)
        return scheduler
