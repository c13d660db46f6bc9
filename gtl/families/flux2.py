"""FLUX.2 dev (Black Forest Labs 2025, https://bfl.ai/blog/flux-2)."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

from gtl.families.base import Conditions
from gtl.families.language_transformer import STATES, LanguageTransformer

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

SYSTEM = """You are an AI that reasons about image descriptions. You give structured responses focusing on object \
relationships, object
attribution and actions without speculation."""


class Flux2(LanguageTransformer):
    """Double blocks, then single blocks, that share their modulations; a language model's middle layers give the text.

    Latents are patches of the VAE's, normalised by what its batch norm has counted. Guidance is distilled into the
    model, which reads its scale.
    """

    name: ClassVar[str] = "flux2"
    classes: Mapping[str, tuple[str, str]] = {
        "transformer": ("diffusers", "Flux2Transformer2DModel"),
        "vae": ("diffusers", "AutoencoderKLFlux2"),
        "text_encoder": ("transformers", "Mistral3ForConditionalGeneration"),
    }
    stacks: ClassVar[tuple[str, ...]] = ("transformer_blocks", "single_transformer_blocks")
    reads_padding: ClassVar[bool] = True
    layers: ClassVar[tuple[int, ...]] = (10, 20, 30)
    """Of the language model: the transformer reads the states behind them."""

    @property
    def classifier_free(self) -> bool:
        """No."""
        return False

    @property
    def side(self) -> int:
        """Of a patch, in the VAE's own latents."""
        return int(self.config("vae")["patch_size"][0])

    @property
    def latent_scale(self) -> int:
        """Pixels a side of a patch."""
        return super().latent_scale * self.side

    @property
    def latent_channels(self) -> int:
        """Those of all latents of a patch."""
        return super().latent_channels * self.side**2

    def encode_images(self, codec: nn.Module | None, pixels: Tensor) -> dict[str, Tensor]:
        """Pixels [B, 3, H, W] in [-1, 1] to the raw moments of patches: mean and logvar, each [B, C, h, w]."""
        from torch.nn.functional import pixel_unshuffle

        moments = super().encode_images(codec, pixels)
        return {name: pixel_unshuffle(value, self.side) for name, value in moments.items()}

    def decode(self, codec: nn.Module | None, latents: Tensor) -> Tensor:
        """Patches as `sample_latents` returns them to pixels [B, 3, H, W], nominally in [-1, 1]."""
        from torch.nn.functional import pixel_shuffle

        vae = cast(Any, codec)
        raw = pixel_shuffle(self.denormalize(latents), self.side)
        pixels: Tensor = vae.decode(raw.to(vae.dtype), return_dict=False)[0]
        return pixels

    def statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean of each channel of the patches, and one over its deviation, [C, 1, 1]."""
        mean, variance = (value.to(like)[:, None, None] for value in self._counted)
        return mean, (variance + self.config("vae")["batch_norm_eps"]).rsqrt()

    @functools.cached_property
    def _counted(self) -> tuple[Tensor, Tensor]:
        """Mean and variance, [C]: out of the file, since latents are sampled where no VAE is loaded."""
        if self.configs_only:
            import torch

            return torch.zeros(self.latent_channels), torch.ones(self.latent_channels)
        stored = {name: tensor for name, tensor in self.weights("vae") if name.startswith("bn.running_")}
        return stored["bn.running_mean"].float(), stored["bn.running_var"].float()

    def phrase(self, prompt: str) -> str:
        """The prompt as a user's message below the instructions; a mark of an image in it is left out."""
        said = (("system", SYSTEM), ("user", prompt.replace("[IMG]", "")))
        chat = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in said]
        phrased: str = self.tokenizers["text_encoder"].apply_chat_template(chat, tokenize=False)
        return phrased

    def select(self, hidden_states: Sequence[Tensor]) -> Tensor:
        """The states behind some layers side by side, [B, tokens, layers D]."""
        import torch

        return torch.cat([hidden_states[layer] for layer in self.layers], dim=-1)

    def predict(self, main: nn.Module, noisy: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """The transformer's raw output for noisy patches [B, C, h, w] at times t [B]."""
        rows, columns = noisy.shape[-2:]
        # The transformer multiplies times by 1000 again.
        tokens: Tensor = main(
            noisy.flatten(2).mT, timestep=t / 1000, img_ids=positions(rows, columns, 1, noisy.device),
            txt_ids=positions(1, 1, conditions[STATES].shape[1], noisy.device), **conditions, return_dict=False,
        )[0]  # fmt: skip
        return tokens.mT.unflatten(2, (rows, columns))

    def dynamic_shift(self, config: Any, num_patches: int, steps: int) -> float:
        """The scheduler's `mu`, which was fitted for 10 and for 200 steps, and is a line between the two.

        The numbers are those of FLUX.2's own sampling code.
        """
        many = 0.00016927 * num_patches + 0.45666666
        if num_patches > 4300:
            return many
        few = 8.73809524e-05 * num_patches + 1.89833333
        return many + (few - many) * (200 - steps) / 190


def positions(rows: int, columns: int, length: int, device: torch.device) -> Tensor:
    """Positions [rows columns length, 4] of tokens: 0, row, column, place in the text."""
    import torch

    return torch.cartesian_prod(*(torch.arange(num, device=device) for num in (1, rows, columns, length)))
