"""Stable Diffusion's safety checker: whether a picture shows what CLIP takes for one of its concepts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import normalize

from gtl.backbones.extractor import exact
from gtl.backbones.place import explained, source_of
from gtl.backbones.pretrained import pillow
from gtl.imports import light, quieted
from gtl.types import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL.Image import Image
    from torch import Tensor
    from typing_extensions import Self

INSIDE = ("safety_checker", "feature_extractor")
"""Of a pipeline, the network and its preprocessing; a repository of the checker alone has both at its top."""
STRICTER = 0.01
"""Less is enough for every concept where a picture shows one that asks for special care."""


class Checker:
    """diffusers' `StableDiffusionSafetyChecker` with its preprocessing; it says what it finds, no more."""

    def __init__(self, network: Any, prepare: Callable[[Image], Tensor], threshold: float) -> None:
        """`prepare` makes pixels [3, H, W] of an RGB picture; for `threshold` see `open_checker`."""
        self._network, self._prepare, self._threshold = network.eval().requires_grad_(False), prepare, threshold
        self._device = "cpu"

    def to(self, device: str) -> Self:
        """This checker, moved to a device."""
        self._network.to(device)
        self._device = device
        return self

    def score(self, image: Image) -> float:
        """How far the nearest concept is beyond its limit, as a difference of cosines; NaN if the network gives it."""
        network = self._network
        with exact():
            pixels = self._prepare(image)[None].to(self._device)
            seen = normalize(network.visual_projection(network.vision_model(pixel_values=pixels).pooler_output))
            care = seen @ normalize(network.special_care_embeds).T - network.special_care_embeds_weights
            found = seen @ normalize(network.concept_embeds).T - network.concept_embeds_weights
            # As the network's own forward does it, which rounds before it compares.
            stricter = STRICTER if (care.round(decimals=3) > 0).any() else 0.0
            return round(float((found + stricter).max()), 3)

    def is_flagged(self, image: Image) -> bool:
        """Whether a picture is to be kept back; of one that cannot be judged it is."""
        return not self.score(image) <= self._threshold


def open_checker(spec: str, threshold: float = 0.0) -> Checker:
    """A safety checker, with its weights, on the CPU.

    Args:
        spec: A local folder or a hub id: of a pipeline that holds `safety_checker` and `feature_extractor`, as Stable
            Diffusion 1.5 does, or of the checker alone.
        threshold: How far beyond a concept's own limit a picture has to be to be flagged; below 0, more is.

    Raises:
        UserError: there is none, or its files are damaged or incomplete.
    """
    source = source_of(spec, "expected a folder or hub id with a safety checker")
    with light():
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
        from transformers import AutoImageProcessor

    with explained(spec, "a safety checker"), quieted():
        inside, beside = INSIDE if _is_pipeline(source) else ("", "")
        processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False, subfolder=beside, **pillow())
        loaded: Any = StableDiffusionSafetyChecker.from_pretrained(
            source, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True, subfolder=inside
        )
    network, info = loaded
    odd = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
    if wrong := sorted({*odd, *(name for name in info["missing_keys"] if not name.endswith("position_ids"))}):
        raise UserError(
            f"{spec}: not usable as a safety checker: {len(wrong)} of its weights are missing or of another shape, the "
            f"first is {wrong[0]}"
        )

    def prepare(image: Image) -> Tensor:
        return processor(images=[image], return_tensors="pt")["pixel_values"][0]

    return Checker(network, prepare, threshold)


def _is_pipeline(source: str) -> bool:
    """Whether the checker is in a folder of its own."""
    if Path(source).is_dir():
        return (Path(source) / "safety_checker").is_dir()
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        hf_hub_download(source, "safety_checker/config.json")
    except EntryNotFoundError:
        return False
    return True
