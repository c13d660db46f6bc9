"""What latent diffusion models share: a VAE, text encoders and a noise path (Rombach et al. 2021, arXiv 2112.10752)."""

from __future__ import annotations

import copy
import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from gtl.families.base import Conditions
from gtl.families.layout import DiffusersLayout
from gtl.families.words import spell_out, teach
from gtl.types import UserError

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    from gtl.diffusion.path import NoisePath
    from gtl.types import Geometry

TEXT_ENCODER = "text_encoder"
"""What the names of text encoders begin with."""
NO_WORDS = "its text encoders cannot learn words; models can whose encoders are all CLIP's, such as sd and sdxl"
TOKENIZERS = {
    "CLIPTextModel": "CLIPTokenizer",
    "CLIPTextModelWithProjection": "CLIPTokenizer",
    "T5EncoderModel": "T5TokenizerFast",
    "Qwen3Model": "Qwen2Tokenizer",
    "Qwen3ForCausalLM": "Qwen2Tokenizer",
    "Qwen2_5_VLForConditionalGeneration": "Qwen2Tokenizer",
    # Its processor, which also takes pictures, reads text with it; which class that is, is written beside it.
    "Mistral3ForConditionalGeneration": "AutoTokenizer",
    "Gemma2Model": "GemmaTokenizerFast",
}
"""What reads prompts for a text encoder, by its class; all in transformers."""


class LatentDiffusion(DiffusersLayout, ABC):
    """A network over the latents of a VAE, with text encoders.

    A family says what its network reads and how prompts become conditions.
    """

    learns: ClassVar[tuple[str, ...]] = ("denoise", "autoencode", "consistency", "distill", "align")
    draws: ClassVar[Literal["by denoising", "at once"]] = "by denoising"
    codec: ClassVar[str | None] = "vae"
    critics: tuple[str, ...] = ()
    token_limits: Mapping[str, int] = {}
    """Of some encoders: how many tokens the model reads, whatever the tokenizer's length."""
    input_layer: str | None = None
    """None: patches are read by layers of other kinds."""
    words: Mapping[str, int] = {}
    """Learned words that the tokenizers know, see `reading` -> number of their vectors."""

    @property
    def classifier_free(self) -> bool:
        """Yes."""
        return True

    @property
    def encoders(self) -> tuple[str, ...]:
        """The text encoders that the model has, each with its tokenizer among the `companions`."""
        return tuple(part for part in self.classes if part.startswith(TEXT_ENCODER))

    @property
    def max_size(self) -> int | None:
        """None: any size."""
        return None

    @functools.cached_property
    def path(self) -> NoisePath:
        """The noise path the model was trained on, from its scheduler config."""
        from gtl.diffusion.path import path_of

        return path_of(self.scheduler_config)

    @property
    def latent_scale(self) -> int:
        """Pixels a side of a latent."""
        return int(2 ** (self.levels("vae") - 1))

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return int(self.config("vae").get("latent_channels", 4))

    def levels(self, part: str, key: str = "block_out_channels") -> int:
        """Resolutions that a part works at, each half of the one before; its config lists their channels."""
        channels = self.config(part).get(key)
        if not channels:
            raise UserError(f"{self.folder / part / 'config.json'}: {key}: missing")
        return len(channels)

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape [C, h, w] of one sample's latents."""
        return self.latent_channels, height // self.latent_scale, width // self.latent_scale

    def encode_images(self, codec: nn.Module | None, pixels: Tensor) -> dict[str, Tensor]:
        """Pixels [B, 3, H, W] in [-1, 1] to the VAE's raw moments: mean and logvar, each [B, C, h, w]."""
        vae = cast(Any, codec)
        moments = vae.encode(pixels.to(vae.dtype)).latent_dist
        return {"mean": moments.mean, "logvar": moments.logvar}

    def sample_latents(self, moments: Mapping[str, Tensor], noise: Tensor) -> Tensor:
        """Draw from the moments with standard normal `noise` of the mean's shape; shifted and scaled for the model."""
        latents = moments["mean"] + (0.5 * moments["logvar"]).exp() * noise
        shift, scaling = self.statistics(latents)
        return (latents - shift) * scaling

    def decode(self, codec: nn.Module | None, latents: Tensor) -> Tensor:
        """Latents as `sample_latents` returns them to pixels [B, 3, H, W], nominally in [-1, 1]."""
        vae = cast(Any, codec)
        pixels: Tensor = vae.decode(self.denormalize(latents).to(vae.dtype), return_dict=False)[0]
        return pixels

    def denormalize(self, latents: Tensor) -> Tensor:
        """Latents as `sample_latents` returns them, in the VAE's own range."""
        shift, scaling = self.statistics(latents)
        return latents / scaling + shift

    def statistics(self, like: Tensor) -> tuple[float | Tensor, float | Tensor]:
        """What the VAE's latents are shifted and then scaled by: numbers, or [C, 1, 1] where and as `like` is."""
        config = self.config("vae")
        # Configs of 1.x and 2.0 were published before the key; it is the autoencoder's default.
        return float(config.get("shift_factor") or 0.0), float(config.get("scaling_factor", 0.18215))

    def tokenize(self, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        """`input_ids` [tokens] of each prompt, `input_ids_2` for the second encoder and so on; cut and padded."""
        return unstack({ids_of(part): self._read(part, prompts)["input_ids"] for part in self.encoders})

    @abstractmethod
    def encode_tokens(self, encoders: Mapping[str, nn.Module], tokens: Mapping[str, Tensor]) -> Conditions:
        """Conditions of stacked tokens, [B, ...]; differentiable in the encoders' weights."""

    def encode_prompts(self, encoders: Mapping[str, nn.Module], prompts: Sequence[str]) -> list[Conditions]:
        """Conditions of each prompt, unbatched; all have the same length."""
        tokens = self.reading(encoders).tokenize(prompts)
        return unstack(self.encode_tokens(encoders, self.collate(tokens)))

    def _read(self, part: str, prompts: Sequence[str], **options: Any) -> Any:
        """Prompts as an encoder's tokenizer reads them, cut and padded to its length; by name, each [B, tokens].

        The ids of learned words begin behind the encoder's table, whatever the tokenizer's.
        """
        tokenizer, prompts = self.tokenizers[part], spell_out(prompts, self.words)
        length = self.token_limits.get(part, tokenizer.model_max_length)
        found = tokenizer(
            prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt", **options
        )
        if self.words:
            first, ids = len(tokenizer) - sum(self.words.values()), found["input_ids"]
            found["input_ids"] = ids.where(ids < first, ids - first + int(self.config(part)["vocab_size"]))
        return found

    @property
    def learns_words(self) -> bool:
        """Whether all encoders are CLIP's."""
        return all(TOKENIZERS[self.classes[part][1]] == "CLIPTokenizer" for part in self.encoders)

    def reading(self, encoders: Mapping[str, nn.Module]) -> LatentDiffusion:
        """The family as it tokenizes prompts for these encoders: with the words that they have learned."""
        from gtl.families.word_table import words_of

        own = (encoders[part] for part in self.encoders if part in encoders)
        words = next((found for encoder in own if (found := words_of(encoder))), {})
        if words and not self.learns_words:
            raise UserError(f"{self.folder}: {NO_WORDS}")
        return self._taught(words) if words else self

    def _taught(self, words: Mapping[str, int]) -> LatentDiffusion:
        """A family of its own whose tokenizers know these words; the last one is kept."""
        kept: LatentDiffusion | None = self.__dict__.get("_reader")
        if kept is None or list(kept.words.items()) != list(words.items()):
            kept = copy.copy(self)
            kept.__dict__.pop("_reader", None)
            kept.__dict__["tokenizers"] = {part: teach(tokenizer, words) for part, tokenizer in self.tokenizers.items()}
            kept.words = words
            self.__dict__["_reader"] = kept
        return kept

    @functools.cached_property
    def tokenizers(self) -> dict[str, Any]:
        """Each text encoder's tokenizer."""
        return {
            part: read_tokenizer(self.classes[part][1], self.folder / self.companions[part]) for part in self.encoders
        }

    def negative_text(self, prompt: str) -> str:
        """The prompt itself."""
        return prompt

    def unconditional(self, empty: Conditions) -> Conditions:
        """The empty prompt's conditions."""
        return empty

    def size_conditions(self, geometry: Geometry) -> Conditions:
        """None."""
        return {}

    def picture_conditions(self, clean: Tensor, rng: torch.Generator) -> Conditions:
        """None."""
        return {}

    def guidance_conditions(self, scale: float) -> Conditions:
        """None."""
        return {}

    def guide(self, unconditional: Tensor, conditional: Tensor, scale: Tensor) -> Tensor:
        """Classifier-free guidance as it was published."""
        return unconditional + scale * (conditional - unconditional)

    def collate(self, conditions: Sequence[Conditions]) -> Conditions:
        """Batch conditions of samples, [B, ...]; all have the same length."""
        import torch

        return {name: torch.stack([sample[name] for sample in conditions]) for name in conditions[0]}


def read_tokenizer(encoder: str, folder: Path) -> Any:
    """The tokenizer in a folder, of transformers, for a text encoder of that class.

    Raises:
        UserError: there is none that can be read.
    """
    import transformers

    name = TOKENIZERS[encoder]
    try:
        return getattr(transformers, name).from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library raises nearly anything
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: not a {name} that can be read: {reason}") from error


def ids_of(encoder: str) -> str:
    """Name of the tokens that an encoder reads: input_ids, input_ids_2, ..."""
    return f"input_ids{encoder.removeprefix(TEXT_ENCODER)}"


def encode_tokens_of(part: str, encoders: Mapping[str, nn.Module], tokens: Mapping[str, Tensor], **options: Any) -> Any:
    """An encoder's output for its own tokens among all, on the encoder's device."""
    encoder = cast(Any, encoders[part])
    return encoder(tokens[ids_of(part)].to(encoder.device), **options)


def unstack(batch: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Tensors [B, ...] by name, as those of each sample."""
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
