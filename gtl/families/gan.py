"""Generative adversarial networks (Goodfellow et al. 2014, arXiv 1406.2661) in diffusers' layout.

A folder has a `model_index.json`, and for `generator` and `discriminator` a `config.json` and safetensors each.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from gtl.families.files import INDEX
from gtl.families.layout import DiffusersLayout
from gtl.types import UserError

if TYPE_CHECKING:
    from torch import nn

GENERATORS = {"ConvGenerator": "gtl.families.gan_conv", "ResidualGenerator": "gtl.families.gan_residual"}
"""Classes of generators -> their module."""
DISCRIMINATORS = {
    "ConvDiscriminator": "gtl.families.gan_conv", "ResidualDiscriminator": "gtl.families.gan_residual",
    "VggDiscriminator": "gtl.families.gan_features", "BackboneDiscriminator": "gtl.families.gan_backbone",
}  # fmt: skip
"""Classes of discriminators -> their module."""
LIBRARY = "gtl"
"""That `model_index.json` names for both."""


class Gan(DiffusersLayout):
    """A generator that draws a picture of one size from noise, and the discriminator that it learned from."""

    name: ClassVar[str] = "gan"
    main: ClassVar[str] = "generator"
    learns: ClassVar[tuple[str, ...]] = ("adversarial",)
    draws: ClassVar[Literal["by denoising", "at once"]] = "at once"
    codec: ClassVar[str | None] = None
    encoders: tuple[str, ...] = ()
    critics: tuple[str, ...] = ("discriminator",)
    learns_words: ClassVar[bool] = False
    scheduler_config: Mapping[str, Any] = {}  # type: ignore[assignment]  # there is no sampler

    def check_index(self) -> None:
        """Settle which networks the model has.

        Raises:
            UserError: one is of a class that is not known.
        """
        self.classes = {
            part: (known[name], name)
            for part, known in (("generator", GENERATORS), ("discriminator", DISCRIMINATORS))
            for name in [self._class_of(part, known)]
        }
        drawn, seen = (self._side_of(part) for part in self.classes)
        if drawn != seen:
            raise UserError(f"{self.folder}: the generator draws {drawn} pixels a side, the discriminator sees {seen}")

    def _class_of(self, part: str, known: Mapping[str, str]) -> str:
        found = self.index.get(part)
        name = found[1] if isinstance(found, list) and len(found) == 2 else found
        if name not in known:
            raise UserError(f"{self.folder / INDEX}: {part}: {name}; expected {' or '.join(known)}")
        return str(name)

    def _side_of(self, part: str) -> int:
        """Of the pictures of a part, in pixels.

        Raises:
            UserError: its config does not say.
        """
        from gtl.families.gan_conv import side_of

        config = self.config(part)
        if isinstance(side := config.get("side"), int):
            return side
        if not isinstance(channels := config.get("channels"), list):
            raise UserError(f"{self.folder / part / 'config.json'}: channels: missing; expected a list")
        return side_of(channels)

    def build(self, part: str) -> nn.Module:
        """The part from its config, with whatever weights the surrounding device context gives.

        Raises:
            UserError: its config does not describe one.
        """
        module, name = self.classes[part]
        network = getattr(importlib.import_module(module), name)
        try:
            built: nn.Module = network.from_config(dict(self.config(part)))
        except (TypeError, ValueError) as error:
            raise UserError(f"{self.folder / part / 'config.json'}: not that of a {name}: {error}") from error
        return built

    @property
    def noise_size(self) -> int:
        """Numbers that a picture is drawn from."""
        return int(self.config("generator")["noise_size"])

    @property
    def multiple(self) -> int:
        """The side of its pictures: there is no other."""
        return self._side_of("generator")

    @property
    def max_size(self) -> int | None:
        """The side of its pictures."""
        return self.multiple

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width) of its pictures."""
        return self.multiple, self.multiple

    def blocks(self, main: nn.Module) -> list[tuple[str, ...]]:
        """Blocks of either network in execution order: the generator's from coarse to fine, the other's back."""
        return [(f"blocks.{number}",) for number in range(len(main.get_submodule("blocks")._modules))]

    def embedders(self, main: nn.Module) -> tuple[str, ...]:
        """What is in front of the blocks."""
        return ("stem",)
