"""What latent diffusion models with a cross-attending UNet share (Rombach et al. 2021, arXiv 2112.10752)."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

from gtl.families.base import Conditions
from gtl.families.layout import DiffusersLayout
from gtl.families.targets import find_targets
from gtl.families.unet import unet_blocks, unet_cross_attentions, unet_embedders
from gtl.types import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gtl.diffusion.path import NoisePath
    from gtl.types import Geometry


class LatentUNet(DiffusersLayout, ABC):
    """A UNet over the latents of a VAE, with CLIP text encoders; predicts noise or velocity.

    A family names its encoders and says how prompts become conditions.
    """

    main: ClassVar[str] = "unet"
    codec: ClassVar[str | None] = "vae"
    encoders: ClassVar[tuple[str, ...]]
    """Each has its tokenizer among the `companions`."""
    corrections: ClassVar[Mapping[str, Any]] = {}
    """Keys of early scheduler configs that the family's pipeline in diffusers replaces."""

    def blocks(self, main: nn.Module) -> list[tuple[str, ...]]:
        """Every ResNet and every transformer block of the UNet in execution order."""
        return unet_blocks(main)

    def embedders(self, main: nn.Module) -> tuple[str, ...]:
        """The input convolution and the time embedding."""
        return unet_embedders(main)

    def lora_targets(self, main: nn.Module, targets: str | Sequence[str]) -> list[str]:
        """Full names of the layers that a target set names, in order."""
        return find_targets(main, self.embedders(main), self.blocks(main), targets)

    def cross_attentions(self, main: nn.Module) -> tuple[str, ...]:
        """The second attention of every transformer block."""
        return unet_cross_attentions(main)

    @functools.cached_property
    def path(self) -> NoisePath:
        """The noise path the model was trained on, from its scheduler config."""
        from gtl.diffusion.path import path_of

        return path_of(self.scheduler_config)

    @property
    def _latent_scale(self) -> int:
        return int(2 ** (self._levels("vae") - 1))

    def _levels(self, part: str) -> int:
        levels = self.config(part).get("block_out_channels")
        if not levels:
            raise UserError(f"{self.folder / part / 'config.json'}: block_out_channels: missing")
        return len(levels)

    @property
    def multiple(self) -> int:
        """The VAE's scale times the UNet's own, so that every level of the UNet halves exactly."""
        return self._latent_scale * int(2 ** (self._levels("unet") - 1))

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels the model was made for."""
        size = self.config("unet").get("sample_size") or 64
        height, width = (size, size) if isinstance(size, int) else size
        return height * self._latent_scale, width * self._latent_scale

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape [C, h, w] of one sample's latents."""
        channels = self.config("vae").get("latent_channels", 4)
        return channels, height // self._latent_scale, width // self._latent_scale

    def encode_images(self, codec: nn.Module | None, pixels: Tensor) -> dict[str, Tensor]:
        """Pixels [B, 3, H, W] in [-1, 1] to the VAE's raw moments: mean and logvar, each [B, C, h, w]."""
        vae = cast(Any, codec)
        moments = vae.encode(pixels.to(vae.dtype)).latent_dist
        return {"mean": moments.mean, "logvar": moments.logvar}

    def sample_latents(self, moments: Mapping[str, Tensor], noise: Tensor) -> Tensor:
        """Draw from the moments with standard normal `noise` of the mean's shape; scaled for the model."""
        return (moments["mean"] + (0.5 * moments["logvar"]).exp() * noise) * self._scaling

    def decode(self, codec: nn.Module | None, latents: Tensor) -> Tensor:
        """Latents as `sample_latents` returns them to pixels [B, 3, H, W], nominally in [-1, 1]."""
        vae = cast(Any, codec)
        pixels: Tensor = vae.decode((latents / self._scaling).to(vae.dtype), return_dict=False)[0]
        return pixels

    @property
    def _scaling(self) -> float:
        # Configs of 1.x and 2.0 were published before the key; it is the autoencoder's default.
        return float(self.config("vae").get("scaling_factor", 0.18215))

    @abstractmethod
    def tokenize(self, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        """What `encode_tokens` reads of each prompt, each [tokens]."""

    @abstractmethod
    def encode_tokens(self, encoders: Mapping[str, nn.Module], tokens: Mapping[str, Tensor]) -> Conditions:
        """Conditions of stacked tokens, [B, ...]; differentiable in the encoders' weights."""

    def encode_prompts(self, encoders: Mapping[str, nn.Module], prompts: Sequence[str]) -> list[Conditions]:
        """Conditions of each prompt, unbatched; all have the same length."""
        return unstack(self.encode_tokens(encoders, self.collate(self.tokenize(prompts))))

    def _read(self, part: str, prompts: Sequence[str]) -> Any:
        """Prompts as an encoder's tokenizer reads them, cut and padded to its length; by name, each [B, tokens]."""
        tokenizer = self.tokenizers[part]
        return tokenizer(
            list(prompts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
            return_tensors="pt",
        )  # fmt: skip

    @functools.cached_property
    def tokenizers(self) -> dict[str, Any]:
        """Each text encoder's tokenizer."""
        from transformers import CLIPTokenizer

        folders = {part: self.folder / self.companions[part] for part in self.encoders}
        found = {}
        for part, folder in folders.items():
            try:
                found[part] = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            except Exception as error:  # the library raises nearly anything
                reason = " ".join(str(error).split())[:200]
                raise UserError(f"{folder}: not a CLIP tokenizer that can be read: {reason}") from error
        return found

    def unconditional(self, empty: Conditions) -> Conditions:
        """The empty prompt's conditions."""
        return empty

    def size_conditions(self, geometry: Geometry) -> Conditions:
        """None."""
        return {}

    def collate(self, conditions: Sequence[Conditions]) -> Conditions:
        """Batch conditions of samples, [B, ...]; all have the same length."""
        import torch

        return {name: torch.stack([sample[name] for sample in conditions]) for name in conditions[0]}

    def predict(self, main: nn.Module, noisy: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """The UNet's raw output for noisy latents [B, C, h, w] at steps t [B]."""
        prediction: Tensor = main(noisy, t, **conditions, return_dict=False)[0]
        return prediction

    def sampler(self, steps: int, height: int, width: int) -> Any:
        """A fresh diffusers scheduler with its timesteps set."""
        from gtl.diffusion.path import make_scheduler

        resolved = make_scheduler(self.scheduler_config).config
        corrected = {key: value for key, value in self.corrections.items() if key in resolved}
        scheduler = make_scheduler({**self.scheduler_config, **corrected})
        scheduler.set_timesteps(steps)
        return scheduler


def unstack(batch: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Tensors [B, ...] by name, as those of each sample."""
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
