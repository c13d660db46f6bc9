"""Heads on what a frozen diffusion model makes of a picture in the middle of denoising it.

Tang et al. 2023 (DIFT, arXiv 2306.03881) match pictures by such features, Mukhopadhyay et al. 2023 (arXiv 2307.08702)
classify by them. A folder is that of the diffusion model with a `head` beside its parts; `features.json` says at which
time and behind which block.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from gtl.families.classifier import Classifier
from gtl.families.files import INDEX, read_json
from gtl.types import Geometry, UserError

if TYPE_CHECKING:
    from gtl.families.base import Conditions, DiffusionFamily

FEATURES = "features.json"
BASE = "_base_class_name"
"""In the index: the pipeline class of the diffusion model."""


class DiffusionClassifier(Classifier):
    """A diffusion model, of which nothing moves, and heads."""

    name: ClassVar[str] = "diffusion_classifier"

    def check_index(self) -> None:
        """Open the diffusion model.

        Raises:
            UserError: it is of another kind than the index says.
        """
        from gtl.families import PIPELINES, family_class

        kind = PIPELINES.get(str(self.index.get(BASE)))
        if kind is None or family_class(kind).draws != "by denoising":
            raise UserError(f"{self.folder / INDEX}: {BASE}: {self.index.get(BASE)}: expected a diffusion model's")
        self.base: DiffusionFamily = family_class(kind)(self.folder, self.variant)
        self.classes = {"head": self._class_of("head", {"Heads": "gtl"})}
        self.told = read_json(self.folder / FEATURES)
        time, block = self.told.get("time"), self.told.get("block")
        if not isinstance(time, int | float) or not 0 <= time <= 1:
            raise UserError(f"{self.folder / FEATURES}: time: {time!r}: expected a number from 0 to 1")
        if not isinstance(block, str):
            raise UserError(f"{self.folder / FEATURES}: block: {block!r}: expected the name of a block")

    @property
    def is_frozen(self) -> bool:
        """Nothing but heads can move."""
        return True

    @property
    def multiple(self) -> int:
        """That of the diffusion model."""
        return self.base.multiple

    @property
    def max_size(self) -> int | None:
        """That of the diffusion model."""
        return self.base.max_size

    @property
    def default_size(self) -> tuple[int, int]:
        """That of the diffusion model."""
        return self.base.default_size

    def build(self, part: str) -> nn.Module:
        """The part from its config."""
        if part != "backbone":
            return super().build(part)
        codec = self.base.build(self.base.codec) if self.base.codec else None
        return self._midway(self.base.build(self.base.main), codec, {})

    def load(self, part: str, dtype: torch.dtype | None = None, device: str = "cpu") -> nn.Module:
        """Build and fill a part, frozen and in eval mode; of the backbone with the conditions of the empty prompt."""
        if part != "backbone":
            return super().load(part, dtype, device)
        base, conditions = self.base, {}
        if device != "meta" and base.encoders:
            encoders = {name: base.load(name, dtype, device) for name in base.encoders}
            with torch.no_grad():
                conditions = base.encode_prompts(encoders, [""])[0]
        codec = base.load(base.codec, dtype, device) if base.codec else None
        return self._midway(base.load(base.main, dtype, device), codec, conditions).eval()

    def _midway(self, main: nn.Module, codec: nn.Module | None, conditions: Conditions) -> Midway:
        if self.told["block"] not in dict(main.named_modules()):
            raise UserError(f"{self.folder / FEATURES}: block: {self.told['block']!r}: the model has no such block")
        return Midway(self.base, main, codec, self.told, conditions)

    def weights(self, part: str) -> Iterator[tuple[str, Tensor]]:
        """Stored tensors, as the part's module names them."""
        if part != "backbone":
            yield from super().weights(part)
            return
        for name, own in (("main", self.base.main), ("codec", self.base.codec)):
            yield from ((f"{name}.{key}", value) for key, value in self.base.weights(own)) if own else ()

    def fingerprint(self, *parts: str) -> str:
        """See `Family`."""
        told = [self.base.fingerprint(), self.told, self.feature_shapes(0, 0)] if parts != ("head",) else []
        own = [super().fingerprint("head")] if parts != ("backbone",) else []
        return hashlib.sha256(json.dumps([told, own], sort_keys=True).encode()).hexdigest()

    def encode_images(self, codec: nn.Module | None, pixels: Tensor) -> dict[str, Tensor]:
        """Pixels [B, 3, H, W] in [-1, 1] to features, [B, ...]."""
        assert codec is not None
        found = codec(pixels)
        return {name: found[name] for name in self.feature_shapes(0, 0)}

    def blocks(self, main: nn.Module) -> list[tuple[str, ...]]:
        """None that could move."""
        return []

    def embedders(self, main: nn.Module) -> tuple[str, ...]:
        """None that could move."""
        return ()


class Midway(nn.Module):
    """A diffusion model up to one of its blocks, at one time; the noise is the same for all pictures."""

    def __init__(
        self, family: DiffusionFamily, main: nn.Module, codec: nn.Module | None, told: Mapping[str, Any],
        conditions: Conditions,
    ) -> None:  # fmt: skip
        """Put together.

        Args:
            family: Says how the model is run.
            main: What denoises.
            codec: From pixels to latents.
            told: `time`, the share of the way to noise, and `block`, the name of a residual block of the UNet.
            conditions: Of the empty prompt, unbatched.
        """
        super().__init__()
        self.family, self.main, self.codec, self.time = family, main, codec, float(told["time"])
        self.block = str(told["block"])
        self.names = tuple(conditions)
        for name, value in conditions.items():
            self.register_buffer(f"condition_{name}", value, persistent=False)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Pixels [B, 3, H, W] in [-1, 1] to `pooled` [B, 2 C], mean and maximum of places, and `map` [B, C, h, w]."""
        family, number = self.family, len(pixels)
        moments = family.encode_images(self.codec, pixels)
        clean = family.sample_latents(moments, torch.zeros_like(moments["mean"]))
        noise = torch.randn(clean.shape[1:], generator=torch.Generator().manual_seed(0)).to(clean).expand_as(clean)
        t = family.path.time(torch.full((number,), self.time)).to(clean.device)
        noisy = family.path.add_noise(clean, noise, t).to(clean.dtype)
        size = (pixels.shape[-2], pixels.shape[-1])
        own = {name: getattr(self, f"condition_{name}") for name in self.names}
        own |= family.size_conditions(Geometry(size, (0, 0), size)) | family.guidance_conditions(1.0)
        conditions = {name: value.to(clean.device) for name, value in family.collate([own] * number).items()}
        seen: list[Tensor] = []
        hook = self.main.get_submodule(self.block).register_forward_hook(lambda _, __, output: seen.append(output))
        try:
            family.predict(self.main, noisy, t, conditions)
        finally:
            hook.remove()
        places = seen[0]
        return {"pooled": torch.cat([places.mean((2, 3)), places.amax((2, 3))], 1), "map": places}
