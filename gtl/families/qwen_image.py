"""Qwen-Image (Qwen Team 2025, arXiv 2508.02324)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

from gtl.families.base import Conditions
from gtl.families.language_transformer import LanguageTransformer
from gtl.families.latent_transformer import pack, unpack

if TYPE_CHECKING:
    from torch import Tensor, nn

SYSTEM = """Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of \
the objects and background:"""
DEFAULT_LATENTS = 128
"""A side of the picture that its pipeline draws unasked; no config has it."""


class QwenImage(LanguageTransformer):
    """Double blocks over packed latents; Qwen2.5-VL reads the prompt below instructions that the transformer skips.

    The VAE is one for video, to which a picture is one frame; its latents are normalised channel by channel.
    """

    name: ClassVar[str] = "qwen_image"
    classes: Mapping[str, tuple[str, str]] = {
        "transformer": ("diffusers", "QwenImageTransformer2DModel"),
        "vae": ("diffusers", "AutoencoderKLQwenImage"),
        "text_encoder": ("transformers", "Qwen2_5_VLForConditionalGeneration"),
    }
    num_dropped: ClassVar[int] = 34  # the instructions, and what begins the user's message
    token_limits: Mapping[str, int] = {"text_encoder": 512 + num_dropped}

    @property
    def latent_scale(self) -> int:
        """Pixels a side of a latent."""
        return int(2 ** len(self.config("vae")["temperal_downsample"]))

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return int(self.config("vae")["z_dim"])

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels that its pipeline draws unasked."""
        size = DEFAULT_LATENTS * self.latent_scale
        return size, size

    def encode_images(self, codec: nn.Module | None, pixels: Tensor) -> dict[str, Tensor]:
        """Pixels [B, 3, H, W] in [-1, 1] to the VAE's raw moments of one frame: mean and logvar, each [B, C, h, w]."""
        moments = super().encode_images(codec, pixels.unsqueeze(2))
        return {name: value.squeeze(2) for name, value in moments.items()}

    def decode(self, codec: nn.Module | None, latents: Tensor) -> Tensor:
        """Latents as `sample_latents` returns them to pixels [B, 3, H, W], the first frame."""
        vae = cast(Any, codec)
        frames = self.denormalize(latents).to(vae.dtype).unsqueeze(2)
        pixels: Tensor = vae.decode(frames, return_dict=False)[0][:, :, 0]
        return pixels

    def statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean of each channel, and one over its deviation, [C, 1, 1]."""
        config = self.config("vae")
        mean, deviation = (like.new_tensor(config[name])[:, None, None] for name in ("latents_mean", "latents_std"))
        return mean, 1 / deviation

    def phrase(self, prompt: str) -> str:
        """The prompt as a user's message below the instructions."""
        chat = (("system", SYSTEM), ("user", prompt))
        said = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in chat)
        return f"{said}<|im_start|>assistant\n"

    def select(self, hidden_states: Sequence[Tensor]) -> Tensor:
        """The states behind the last layer."""
        return hidden_states[-1]

    def predict(self, main: nn.Module, noisy: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """The transformer's raw output for noisy latents [B, C, h, w] at times t [B]."""
        rows, columns = (side // self.patch_size for side in noisy.shape[-2:])
        packed: Tensor = main(
            pack(noisy), timestep=t / 1000, img_shapes=[[(1, rows, columns)]] * len(noisy), **conditions,
            return_dict=False,
        )[0]  # fmt: skip
        return unpack(packed, rows, columns)

    def guide(self, unconditional: Tensor, conditional: Tensor, scale: Tensor) -> Tensor:
        """Classifier-free guidance that keeps the length of each token's prediction."""
        guided, kept = (pack(each) for each in (super().guide(unconditional, conditional, scale), conditional))
        lengths = [each.norm(dim=-1, keepdim=True) for each in (kept, guided)]
        rows, columns = (side // self.patch_size for side in conditional.shape[-2:])
        return unpack(guided * (lengths[0] / lengths[1]), rows, columns)
