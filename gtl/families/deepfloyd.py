"""DeepFloyd IF, the open model after Imagen (Saharia et al. 2022, arXiv 2205.11487): the first stage of its cascade."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, cast

from gtl.families.base import Conditions
from gtl.families.latent import encode_tokens_of, unstack
from gtl.families.latent_unet import LatentUNet
from gtl.families.targets import ADDED, find_targets
from gtl.families.unet import unet_cross_attentions

if TYPE_CHECKING:
    from torch import Tensor, nn

TOKENS = 77
"""That the model reads of a prompt: neither its configs nor T5's tokenizer say it, its pipeline in diffusers does."""
LEVELS = 127.5
"""From a byte to its place in [-1, 1]."""


class DeepFloyd(LatentUNet):
    """A UNet over pixels, with T5. It predicts noise, and beside it where between its bounds the variance is.

    No codec: what takes the place of latents are pixels, and of moments their bytes, which say all there is of an
    8-bit picture in a quarter of the room.

    What is left of its variance after the UNet has been trained is up to the loss: that of the noise says nothing of
    it, and it would drift with the layers in front of it, whichever move. So `denoise` and `distill` add the term that
    the model was made with (Nichol & Dhariwal 2021, arXiv 2102.09672), see `gtl.diffusion.variance`.
    """

    name: ClassVar[str] = "deepfloyd"
    # Not consistency: at the noisy end of its schedule a guess of the noise says nothing of the picture, since what is
    # left of the signal is a few thousandths of a per cent.
    learns: ClassVar[tuple[str, ...]] = ("denoise", "distill")
    codec: ClassVar[str | None] = None
    classes: Mapping[str, tuple[str, str]] = {
        "unet": ("diffusers", "UNet2DConditionModel"),
        "text_encoder": ("transformers", "T5EncoderModel"),
    }
    companions: ClassVar[Mapping[str, str]] = {"text_encoder": "tokenizer"}
    token_limits: Mapping[str, int] = {"text_encoder": TOKENS}

    def build(self, part: str) -> nn.Module:
        """The part from its config, with whatever weights the surrounding device context gives.

        What leaves the UNet's attentions is laid out anew, plane by plane: torch's group normalisation on CPUs crashes
        in the backward pass of pixels that lie together and want no gradient, as behind blocks that are frozen.
        """
        module = super().build(part)
        for name in unet_cross_attentions(module) if part == self.main else ():
            module.get_submodule(name).register_forward_hook(lay_out)
        return module

    @property
    def latent_scale(self) -> int:
        """A pixel is a pixel."""
        return 1

    @property
    def latent_channels(self) -> int:
        """Colours."""
        return int(self.config("unet")["in_channels"])

    def lora_targets(self, main: nn.Module, targets: str | Sequence[str]) -> list[str]:
        """Full names of the layers that a target set names, in order; there is no feed-forward among them."""
        return find_targets(main, self.embedders(main), self.blocks(main), targets, ADDED)

    def encode_images(self, codec: nn.Module | None, pixels: Tensor) -> dict[str, Tensor]:
        """Pixels [B, 3, H, W] in [-1, 1] to their bytes: `mean`, uint8 [B, 3, H, W]."""
        import torch

        return {"mean": pixels.float().add(1).mul(LEVELS).round().clamp(0, 2 * LEVELS).to(torch.uint8)}

    def sample_latents(self, moments: Mapping[str, Tensor], noise: Tensor) -> Tensor:
        """Bytes to pixels in [-1, 1], of the noise's dtype; there is nothing to draw."""
        return moments["mean"].to(noise.dtype) / LEVELS - 1

    def decode(self, codec: nn.Module | None, latents: Tensor) -> Tensor:
        """Themselves."""
        return latents

    def tokenize(self, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        """`input_ids` and `attention_mask` [tokens] of each prompt, in lower case; cut and padded."""
        batch = self._read("text_encoder", [prompt.lower().strip() for prompt in prompts])
        return unstack({name: batch[name] for name in ("input_ids", "attention_mask")})

    def encode_tokens(self, encoders: Mapping[str, nn.Module], tokens: Mapping[str, Tensor]) -> Conditions:
        """The encoder's last hidden states, [B, tokens, D]; the UNet attends to the padding too."""
        mask = tokens["attention_mask"].to(next(encoders["text_encoder"].parameters()).device)
        states = encode_tokens_of("text_encoder", encoders, tokens, attention_mask=mask)[0]
        return {"encoder_hidden_states": cast("Tensor", states)}

    def predict(self, main: nn.Module, noisy: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """The noise in pixels [B, 3, H, W] at steps t [B], and behind it the variance: [B, 6, H, W].

        The UNet normalises the text before anything else, which on CPUs has to be in the dtype of its weights.
        """
        text = conditions["encoder_hidden_states"].to(next(main.parameters()).dtype)
        return super().predict(main, noisy, t, {**conditions, "encoder_hidden_states": text})

    def guide(self, unconditional: Tensor, conditional: Tensor, scale: Tensor) -> Tensor:
        """Guidance of the noise; the variance, where there is one behind it, is that of the condition."""
        import torch

        num = self.latent_channels
        noise = super().guide(unconditional[:, :num], conditional[:, :num], scale)
        return torch.cat([noise, conditional[:, num:]], dim=1)


def lay_out(module: nn.Module, args: object, output: Tensor) -> Tensor:
    """A module's output, contiguous."""
    return output.contiguous()
