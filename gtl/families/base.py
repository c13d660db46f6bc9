"""What a model family says. Everything that differs between model architectures is behind these verbs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    from gtl.diffusion.path import NoisePath
    from gtl.types import Geometry, Sampler, Task

Conditions = dict[str, "Tensor"]
"""Everything `predict` needs beside latents and time, by name. For one sample without a batch dimension."""


class Family(Protocol):
    """A model opened from a folder: its config files are read, no weight is loaded.

    Parts are the folder names of the diffusers layout: unet, vae, text_encoder, ...
    Methods take modules as arguments, so a family holds no weights and is cheap to make and to pickle.
    """

    name: ClassVar[str]
    folder: Path
    variant: str | None
    """Of the weight files that are read, for example fp16."""
    configs_only: bool
    """Whether it was opened to ask for shapes, and its weight files need not be there."""

    learns: ClassVar[tuple[str, ...]]
    """What it can learn, by `objective.type`."""
    draws: ClassVar[Literal["by denoising", "at once", "nothing"]]
    """How a picture comes about."""
    draws_alone: ClassVar[bool]
    """Whether without being given a smaller one; else it is an `EnlargingFamily`."""
    codec: ClassVar[str | None]
    """Part that maps pixels to latents (vae), or to features; None: identity, the model works on pixels."""

    @property
    def main(self) -> str:
        """The part that is fine-tuned: unet, transformer, generator, ..."""
        ...

    @property
    def encoders(self) -> tuple[str, ...]:
        """Parts that encode prompts, in the order the model reads them; () if it reads none."""
        ...

    @property
    def critics(self) -> tuple[str, ...]:
        """Parts that only training needs: a discriminator."""
        ...

    @property
    def heads(self) -> tuple[str, ...]:
        """Parts that say what is in a picture, of what the main part makes of it."""
        ...

    @property
    def multiple(self) -> int:
        """Height and width in pixels must be multiples of this."""
        ...

    @property
    def max_size(self) -> int | None:
        """The largest height and width in pixels; None: any."""
        ...

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels the model was made for."""
        ...

    @property
    def learns_words(self) -> bool:
        """Whether it can learn words: its encoders look tokens up in tables, and their tokenizers take further ones."""
        ...

    def build(self, part: str) -> nn.Module:
        """The part from its config, with whatever weights the surrounding device context gives (meta, partitioned)."""
        ...

    def weights(self, part: str) -> Iterator[tuple[str, Tensor]]:
        """Stored tensors one by one, keyed as in the module's state dict; one tensor is in memory at a time."""
        ...

    def load(self, part: str, dtype: torch.dtype | None = None, device: str = "cpu") -> nn.Module:
        """Build and fill a part, frozen and in eval mode. dtype None keeps the stored one.

        Raises:
            UserError: files are missing, damaged, or do not match the config.
        """
        ...

    def fingerprint(self, *parts: str) -> str:
        """Hash (hex) of the parts' weights and configs, for cache keys and cards; no parts means all of the model."""
        ...

    def blocks(self, main: nn.Module) -> list[tuple[str, ...]]:
        """Blocks of the main part in execution order, each as the module-name prefixes that belong to it.

        Of a critic too. A block is the smallest unit that runs once in order: each ResNet and each transformer block. A
        down- or upsampler belongs to the block before it, and so do an attention module's input and output projections.
        """
        ...

    def counterparts(self, main: nn.Module, larger: nn.Module) -> list[tuple[str, str]]:
        """Modules of the main part, and those of a larger one of its kind that do the same, in execution order."""
        ...

    def embedders(self, main: nn.Module) -> tuple[str, ...]:
        """Module-name prefixes in front of the blocks (input projection, time embedding); frozen when depth > 0."""
        ...

    def lora_targets(self, main: nn.Module, targets: str | Sequence[str]) -> list[str]:
        """Full names of the layers that a target set names (see `gtl.config.tuners.LoraTuner.targets`), in order.

        Raises:
            UserError: nothing matches.
        """
        ...

    def encoder_targets(self, encoder: nn.Module, targets: str | Sequence[str]) -> list[str]:
        """`lora_targets` for a text encoder: the same sets, inside its layers.

        Raises:
            UserError: nothing matches.
        """
        ...

    def cross_attentions(self, main: nn.Module) -> tuple[str, ...]:
        """Names of the modules of the main part that attend to the condition; () where it enters in other ways."""
        ...

    def export(self, parts: Mapping[str, nn.Module], folder: Path) -> None:
        """Write a full diffusers-layout model: the given parts, everything else copied from `self.folder`."""
        ...


class DiffusionFamily(Family, Protocol):
    """A family that generates by denoising."""

    @property
    def classifier_free(self) -> bool:
        """Whether guidance leads away from a second prediction (Ho & Salimans 2022, arXiv 2207.12598).

        A model that was distilled needs none: it reads the scale itself, see `guidance_conditions`, or has it built in.
        """
        ...

    @property
    def path(self) -> NoisePath:
        """The noise path the model was trained on, from its scheduler config."""
        ...

    def middle(self, main: nn.Module) -> tuple[str, int]:
        """The module half-way through the main part, and the number of channels that it puts out."""
        ...

    def sections(self, main: nn.Module) -> list[tuple[str, int]]:
        """Modules from the main part's begin to its end that see the picture and the text, in execution order, and the
        number of channels that each puts out."""
        ...

    @property
    def input_layer(self) -> str | None:
        """The main part's convolution over latents, if it can be given further channels; see `gtl.families.wide`."""
        ...

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape [C, h, w] of one sample's latents."""
        ...

    def encode_images(self, codec: nn.Module | None, pixels: Tensor) -> dict[str, Tensor]:
        """Pixels [B, 3, H, W] in [-1, 1] to the codec's raw moments: mean and logvar, each [B, C, h, w].

        A codec that encodes to a point and not to a distribution has no logvar.
        """
        ...

    def sample_latents(self, moments: Mapping[str, Tensor], noise: Tensor) -> Tensor:
        """Draw from the moments with standard normal `noise` of the mean's shape; shifted and scaled for the model."""
        ...

    def tokenize(self, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        """What `encode_tokens` reads of each prompt, without a batch dimension; `collate` batches it."""
        ...

    def encode_tokens(self, encoders: Mapping[str, nn.Module], tokens: Mapping[str, Tensor]) -> Conditions:
        """Conditions of a batch of tokens, [B, ...]; differentiable in the encoders' weights."""
        ...

    def encode_prompts(self, encoders: Mapping[str, nn.Module], prompts: Sequence[str]) -> list[Conditions]:
        """Conditions of each prompt, unbatched; the padding's mask is among them where the model has one."""
        ...

    @property
    def tokenizers(self) -> Mapping[str, Any]:
        """Each text encoder's tokenizer, of transformers."""
        ...

    def reading(self, encoders: Mapping[str, nn.Module]) -> DiffusionFamily:
        """The family as it tokenizes prompts for these encoders: with the words that they have learned.

        Itself if they have learned none. `encode_prompts` sees to it, `tokenize` knows no encoders.

        Raises:
            UserError: a word is one of the model's own tokens, or the family cannot learn words.
        """
        ...

    def negative_text(self, prompt: str) -> str:
        """A negative prompt as `tokenize` and `encode_prompts` take it: itself in most models.

        Other than itself where the model reads negative prompts in another way than prompts; "" is always "".
        """
        ...

    def unconditional(self, empty: Conditions) -> Conditions:
        """What guidance leads away from where no negative prompt is given; `empty` are the empty prompt's conditions.

        Those themselves for most models. Training drops a caption to the empty prompt in every model.
        """
        ...

    def size_conditions(self, geometry: Geometry) -> Conditions:
        """Conditions that depend on the crop (SDXL's time ids); {} for most models."""
        ...

    def picture_conditions(self, clean: Tensor, rng: torch.Generator) -> Conditions:
        """Conditions that training makes of the sample itself, latents [C, h, w], and of what is drawn for them.

        {} for most models, for which nothing is drawn; see `EnlargingFamily`.
        """
        ...

    def guidance_conditions(self, scale: float) -> Conditions:
        """Conditions that tell a distilled model the scale of its guidance; {} for most models.

        Training takes scale 1, at which a distilled model predicts what is in the data (Meng et al. 2022, arXiv
        2210.03142, section 3.1).
        """
        ...

    def guide(self, unconditional: Tensor, conditional: Tensor, scale: Tensor) -> Tensor:
        """Classifier-free guidance away from one prediction, as of `predict`, to and beyond another.

        scale [B, 1, 1, 1]. A variance is not guided: it is the other's.
        """
        ...

    def collate(self, conditions: Sequence[Conditions]) -> Conditions:
        """Batch conditions or tokens of samples, [B, ...], padding what has to be."""
        ...

    def predict(self, main: nn.Module, noisy: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """The network's raw output for noisy latents [B, C, h, w] at times t [B], in the model's own time units.

        [B, C, h, w], or [B, 2 C, h, w] of a model whose sampler reads the variance that it predicts beside.
        """
        ...

    def decode(self, codec: nn.Module | None, latents: Tensor) -> Tensor:
        """Latents as `sample_latents` returns them to pixels [B, 3, H, W] in [-1, 1]."""
        ...

    def sampler(self, steps: int, height: int, width: int, kind: Sampler = "model") -> Any:
        """A fresh diffusers scheduler with its timesteps set for images of this size."""
        ...


class EnlargingFamily(DiffusionFamily, Protocol):
    """A family that draws a picture with the details that a smaller one lacks: a later stage of a cascade.

    It is shown the small picture with noise of its own, and told how much (noise conditioning augmentation, Ho et al.
    2021, arXiv 2106.15282): what an earlier stage draws is not quite what training's small pictures are.
    """

    @property
    def enlarges(self) -> int:
        """How many times larger than the picture that it is given its own is."""
        ...

    def enlarging(self, small: Tensor, height: int, width: int, rng: torch.Generator) -> Conditions:
        """Conditions of a request, unbatched, for enlarging a picture [3, h, w] in [-1, 1]; `rng` draws its noise."""
        ...

    def lent(self, first: DiffusionFamily) -> EnlargingFamily:
        """The family as it reads prompts by the first stage's text encoder and tokenizer, its own or none.

        Raises:
            UserError: it was made for another encoder.
        """
        ...


class SeeingFamily(Family, Protocol):
    """A family whose main part makes features of pictures, or of captions, of which its head says what is in them."""

    @property
    def tasks(self) -> Mapping[str, Task]:
        """What the head says, by name."""
        ...

    @property
    def is_frozen(self) -> bool:
        """Whether nothing but heads can move."""
        ...

    def feature_shapes(self, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """Of the features of one picture, by name."""
        ...

    def encode_images(self, codec: nn.Module | None, pixels: Tensor) -> dict[str, Tensor]:
        """Pixels [B, 3, H, W] in [-1, 1] to features, [B, ...]; differentiable in the weights of the main part.

        Raises:
            UserError: it has `encoders`: its features are of captions.
        """
        ...

    def encode_prompts(self, encoders: Mapping[str, nn.Module], prompts: Sequence[str]) -> list[Conditions]:
        """Features of each caption, unbatched, of a family with `encoders`.

        Raises:
            UserError: it has none: its features are of pictures.
        """
        ...


class NoiseFamily(Family, Protocol):
    """A family whose main part makes pixels [B, 3, H, W] in [-1, 1] of noise [B, noise_size] in one pass.

    Its critic makes logits [B] of pixels, above 0 for those that look real.
    """

    @property
    def noise_size(self) -> int:
        """Numbers, standard normal, that a picture is made of."""
        ...
