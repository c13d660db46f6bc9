"""DeepFloyd IF's second stage, which enlarges what the first one draws (Saharia et al. 2022, arXiv 2205.11487)."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import math
from typing import TYPE_CHECKING, Any, ClassVar

from gtl.families.base import Conditions
from gtl.families.deepfloyd import DeepFloyd
from gtl.families.files import INDEX, read_json
from gtl.types import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from gtl.diffusion.path import NoisePath
    from gtl.families.base import DiffusionFamily

SCALE = 4
"""Of the published models, from 64 to 256 pixels; their files do not say it. In model_index.json `scale` does."""
LEVEL = 250
"""Of 1000: how far the small picture is noised when it is enlarged, the default of its pipeline in diffusers."""
SMALL, NOISED = "small", "noised"
"""Conditions: the small picture, enlarged by interpolation and noised, and how far."""
NOISING = "image_noising_scheduler"
"""The folder whose config says how."""
READER = "text_encoder"


class DeepFloydUpscaler(DeepFloyd):
    """A UNet over the pixels of a picture that is drawn, beside those of a smaller one; it reads the prompt, too.

    Training makes the smaller one of the picture itself, and noises it by a level of its own (noise conditioning
    augmentation, Ho et al. 2021, arXiv 2106.15282): both come of the sample's draw.

    Its folder may go without a text encoder, which is that of the first stage; then it can be drawn with, not trained.
    """

    name: ClassVar[str] = "deepfloyd_upscaler"
    draws_alone: ClassVar[bool] = False
    optional: ClassVar[frozenset[str]] = frozenset({READER})

    def check_index(self) -> None:
        """Settle which parts the model has, and how many times it enlarges.

        Raises:
            UserError: a part is of another class than the family's, or the scale is none.
        """
        super().check_index()
        if not (self.folder / READER).is_dir():  # listed all the same where it was left out to save room
            self.classes = {part: kind for part, kind in self.classes.items() if part != READER}
        scale = self.index.get("scale", SCALE)
        if not isinstance(scale, int) or scale < 2:
            raise UserError(f"{self.folder / INDEX}: scale: {scale!r}: expected a whole number from 2 on")
        self._scale = scale

    @property
    def encoders(self) -> tuple[str, ...]:
        """The text encoder.

        Raises:
            UserError: the folder has none.
        """
        if READER not in self.classes:
            raise UserError(
                f"{self.folder}: has no {READER}, so that it can only be drawn with, as the upscaler of its first "
                f"stage; to train it, put that one's {READER} and tokenizer beside its unet and into {INDEX}"
            )
        return (READER,)

    @property
    def enlarges(self) -> int:
        """How many times."""
        return self._scale

    @property
    def multiple(self) -> int:
        """So that the small picture has whole pixels, too."""
        return math.lcm(super().multiple, self._scale)

    @property
    def latent_channels(self) -> int:
        """Colours of one of the two pictures that the UNet sees."""
        return int(self.config("unet")["in_channels"]) // 2

    @functools.cached_property
    def noising(self) -> NoisePath:
        """How small pictures are noised."""
        from gtl.diffusion.path import path_of

        return path_of(self.noising_config)

    @functools.cached_property
    def noising_config(self) -> dict[str, Any]:
        """The config of the scheduler that says it."""
        return read_json(self.folder / NOISING / "scheduler_config.json")

    def fingerprint(self, *parts: str) -> str:
        """Hash (hex) of the parts, or of all of the model, and then of how it noises small pictures."""
        found = super().fingerprint(*parts)
        if parts:
            return found
        noising = json.dumps(self.noising_config, sort_keys=True)
        return hashlib.sha256(f"{found} {self._scale} {noising}".encode()).hexdigest()

    def picture_conditions(self, clean: Tensor, rng: torch.Generator) -> Conditions:
        """`small` [3, H, W], of pixels [3, H, W] made smaller, to bytes, larger again and noised, and how far.

        The level is uniform over all (arXiv 2205.11487, section 2.4, and algorithm 1).
        """
        import torch
        from torch.nn.functional import interpolate

        height, width = clean.shape[-2:]
        size = height // self._scale, width // self._scale
        small = interpolate(clean[None], size, mode="bilinear", antialias=True)
        small = self.sample_latents(self.encode_images(None, small), small)[0]
        level = torch.randint(self.noising.num_train_timesteps, (), generator=rng)
        return self._noised(small, height, width, level, rng)

    def enlarging(self, small: Tensor, height: int, width: int, rng: torch.Generator) -> Conditions:
        """`small` [3, height, width], of a picture [3, h, w], and how far it is noised."""
        import torch

        return self._noised(small, height, width, torch.tensor(LEVEL), rng)

    def _noised(self, small: Tensor, height: int, width: int, level: Tensor, rng: torch.Generator) -> Conditions:
        import torch
        from torch.nn.functional import interpolate

        large = interpolate(small[None], (height, width), mode="bilinear", align_corners=True)
        noise = torch.randn(large.shape, generator=rng).to(large)
        noised = self.noising.add_noise(large, noise, level.view(1).to(large.device))[0]
        return {SMALL: noised, NOISED: level}

    def predict(self, main: nn.Module, noisy: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """The noise in pixels [B, 3, H, W] at steps t [B], and behind it the variance: [B, 6, H, W]."""
        import torch

        text = {name: value for name, value in conditions.items() if name not in (SMALL, NOISED)}
        both = torch.cat([noisy, conditions[SMALL].to(noisy)], dim=1)
        return super().predict(main, both, t, {**text, "class_labels": conditions[NOISED]})

    def lent(self, first: DiffusionFamily) -> DeepFloydUpscaler:
        """The family as it reads prompts by the first stage's text encoder and tokenizer, its own or none.

        Raises:
            UserError: it was made for another encoder.
        """
        if not isinstance(first, DeepFloyd) or isinstance(first, DeepFloydUpscaler):
            raise UserError(f"{self.folder}: enlarges what a model of family {DeepFloyd.name} draws, not {first.name}")
        unet = self.config("unet")
        wanted, found = unet.get("encoder_hid_dim") or unet["cross_attention_dim"], first.config(READER)["d_model"]
        if wanted != found:
            raise UserError(
                f"{self.folder}: reads {wanted} numbers a token; the {READER} of {first.folder} has {found}"
            )
        lent = copy.copy(self)
        lent.classes = {**self.classes, READER: first.classes[READER]}
        lent.__dict__["_configs"] = {**self._configs, READER: first.config(READER)}
        lent.__dict__["tokenizers"] = first.tokenizers
        return lent
