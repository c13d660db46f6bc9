"""Model families: one file each."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, cast

from gtl.families.files import INDEX, read_json
from gtl.families.source import resolve
from gtl.types import UserError

if TYPE_CHECKING:
    from gtl.families.base import DiffusionFamily, Family, SeeingFamily

FAMILIES: dict[str, str] = {
    "sd": "gtl.families.sd:StableDiffusion",
    "sdxl": "gtl.families.sdxl:StableDiffusionXL",
    "sd3": "gtl.families.sd3:StableDiffusion3",
    "flux": "gtl.families.flux:Flux",
    "flux2": "gtl.families.flux2:Flux2",
    "flux2_klein": "gtl.families.flux2_klein:Flux2Klein",
    "qwen_image": "gtl.families.qwen_image:QwenImage",
    "z_image": "gtl.families.z_image:ZImage",
    "pixart": "gtl.families.pixart:PixArt",
    "sana": "gtl.families.sana:Sana",
    "deepfloyd": "gtl.families.deepfloyd:DeepFloyd",
    "deepfloyd_upscaler": "gtl.families.deepfloyd_upscaler:DeepFloydUpscaler",
    "gan": "gtl.families.gan:Gan",
    "classifier": "gtl.families.classifier:Classifier",
    "diffusion_classifier": "gtl.families.diffusion_classifier:DiffusionClassifier",
    "text_classifier": "gtl.families.text_classifier:TextClassifier",
}
"""Families by name, imported when opened."""

PIPELINES: dict[str, str] = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusionXLImg2ImgPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
    "Flux2Pipeline": "flux2",
    "Flux2KleinPipeline": "flux2_klein",
    "QwenImagePipeline": "qwen_image",
    "ZImagePipeline": "z_image",
    "PixArtAlphaPipeline": "pixart",
    "PixArtSigmaPipeline": "pixart",
    "SanaPipeline": "sana",
    "IFPipeline": "deepfloyd",
    "IFSuperResolutionPipeline": "deepfloyd_upscaler",
    "GanPipeline": "gan",
    "ClassifierPipeline": "classifier",
    "DiffusionClassifierPipeline": "diffusion_classifier",
    "TextClassifierPipeline": "text_classifier",
}
"""Family by the pipeline class that model_index.json names."""


def open_family(
    source: str, family: str = "auto", revision: str | None = None, variant: str | None = None, weights: bool = True
) -> Family:
    """Find a model's files, downloading what is missing, and read its configs; no weight is loaded.

    Without `weights` no weight file is downloaded either.

    Raises:
        UserError: there is no such model, its kind is not supported, or it is of another family than the given one.
    """
    if family not in ("auto", *FAMILIES):
        raise UserError(f"model.family: {family!r}: known families: auto, {', '.join(FAMILIES)}")
    folder = resolve(source, revision, variant, weights)
    pipeline = read_json(folder / INDEX).get("_class_name")
    found = PIPELINES.get(str(pipeline))
    if found is None:
        supported = ", ".join(PIPELINES)
        raise UserError(f"model.source: {source}: {INDEX} names a {pipeline}; supported: {supported}")
    if family not in ("auto", found):
        raise UserError(f"model.family: {family!r}: the model at {source} is of family {found!r} ({pipeline})")
    opened = family_class(found)(folder, variant)
    opened.origin = (source, found, revision, variant)
    opened.configs_only = not weights
    return opened


def family_class(name: str) -> Any:
    """A family of `FAMILIES`, before any model of it is opened."""
    module, _, own = FAMILIES[name].partition(":")
    return getattr(importlib.import_module(module), own)


def denoising(family: Family) -> DiffusionFamily:
    """A family as one that generates by denoising, for what only such models can do.

    Raises:
        UserError: it is none.
    """
    if family.draws != "by denoising":
        raise UserError(
            f"model.source: {family.folder}: a model of family {family.name} draws {family.draws}; this is for models "
            "that draw by denoising"
        )
    return cast("DiffusionFamily", family)


def encoding(family: Family) -> DiffusionFamily | SeeingFamily:
    """A family as one that makes latents of pictures and conditions of captions, or features of either.

    Raises:
        UserError: it does not.
    """
    return cast("SeeingFamily", family) if family.heads else denoising(family)


def seeing(family: Family) -> SeeingFamily:
    """A family as one that says what is in pictures.

    Raises:
        UserError: it does not.
    """
    if not family.heads:
        raise UserError(
            f"model.source: {family.folder}: a model of family {family.name} has no heads that say what is in a "
            "picture; `gtl heads` makes a model with some"
        )
    return cast("SeeingFamily", family)
