"""What pictures, or their captions, are compared by: a backbone, or the network under the heads of `gtl heads`, which
says where in a diffusion model they are looked at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gtl.backbones import open_backbone
from gtl.families import PIPELINES, family_class, open_family, seeing
from gtl.families.files import INDEX, read_json
from gtl.families.source import BUILTIN, builtin_folder
from gtl.features.say import square
from gtl.types import UserError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor
    from typing_extensions import Self

    from gtl.backbones.base import Backbone
    from gtl.families.base import SeeingFamily

BATCH = 64
"""Texts that are read at once."""


def open_network(spec: str) -> Backbone | Reader:
    """What a spec names, with its weights, on the CPU.

    Args:
        spec: The folder of a model that `gtl heads` made; or see `gtl.backbones.open_backbone`.

    Raises:
        UserError: there is no such thing, or its files are not what they have to be.
    """
    if has_heads(spec):
        family = seeing(open_family(spec))
        return Reader(spec, family) if family.encoders else Seer(spec, family)
    if denoises(spec):
        raise UserError(
            f"{spec}: a diffusion model has features at every block and time; `gtl heads {spec} --block --time` makes "
            "a folder that says which, and that is taken here"
        )
    return open_backbone(spec)


def has_heads(spec: str) -> bool:
    """Whether it is the folder of a model that `gtl heads` made."""
    kind = kind_of(Path(spec).expanduser())
    return kind is not None and bool(kind.heads)


def denoises(spec: str) -> bool:
    """Whether it is a diffusion model."""
    is_builtin = spec.startswith(BUILTIN)
    kind = kind_of(builtin_folder(spec.removeprefix(BUILTIN)) if is_builtin else Path(spec).expanduser())
    return kind is not None and kind.draws == "by denoising"


def kind_of(folder: Path) -> Any:
    """The family of the model in a folder; None: it holds none."""
    index = folder / INDEX
    kind = PIPELINES.get(str(read_json(index).get("_class_name"))) if index.is_file() else None
    return None if kind is None else family_class(kind)


class Seer:
    """A `Backbone`: the network under heads, by what classes are told by."""

    def __init__(self, name: str, family: SeeingFamily) -> None:
        """Load it."""
        self.name, self._family = name, family
        height, width = family.default_size
        self.resize = f"centre crop {width} x {height}"
        (self.dimensions,) = family.feature_shapes(0, 0)["pooled"]
        self._network = family.load(family.main, torch.float32).eval()
        self._device = "cpu"

    def fingerprint(self) -> str:
        """See `Backbone`."""
        return self._family.fingerprint(self._family.main)

    def to(self, device: str) -> Self:
        """See `Backbone`."""
        self._network.to(device)
        self._device = device
        return self

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image]) -> tuple[Tensor, None]:
        """See `Backbone`."""
        if not images:
            raise ValueError("no images")
        rows = []
        for image in images:  # one by one, as they do not depend on each other then
            pixels, _, _ = square(image, self._family.default_size)
            rows.append(self._family.encode_images(self._network, pixels.to(self._device))["pooled"].float().cpu())
        return torch.cat(rows), None


class Reader:
    """The text encoder under heads, which sees nothing."""

    def __init__(self, name: str, family: SeeingFamily) -> None:
        """Load it."""
        self.name, self._family = name, family
        self._encoders = {part: family.load(part, torch.float32).eval() for part in family.encoders}

    def fingerprint(self) -> str:
        """Of its weights."""
        return self._family.fingerprint(*self._family.encoders)

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, None]:
        """Features [N, D] of texts, fp32 on the CPU."""
        rows: list[Tensor] = []
        for start in range(0, len(texts), BATCH):
            found = self._family.encode_prompts(self._encoders, texts[start : start + BATCH])
            rows += [each["pooled"] for each in found]
        return torch.stack(rows), None

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """The same of words that something is looked for by."""
        return self(texts)[0]
