"""Class images for prior preservation (Ruiz et al. 2022, arXiv 2208.12242): drawn once by the base model, then kept."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gtl.config.objectives import PriorPreservation
from gtl.storage import Store
from gtl.types import Progress

if TYPE_CHECKING:
    import torch

    from gtl.families.base import DiffusionFamily
    from gtl.generate.engine import Request


FOLDER = "class_images"
"""In the cache."""


def class_images(
    family: DiffusionFamily,
    prior: PriorPreservation,
    cache: Store,
    *,
    device: str,
    dtype: torch.dtype,
    progress: Progress | None = None,
) -> Store:
    """The folder in the cache with `prior.images` pictures of the prior's prompt; draws those that are missing.

    A run goes on where another was cut off. Two runs at once write the same files, each of them whole.

    Raises:
        UserError: the prior's settings or the model's files are wrong, or the cache cannot be written.
    """
    from gtl.generate.images import generate
    from gtl.images import save_png

    folder = class_folder(family, prior, cache, dtype)
    first, recipe = plan(family, prior, dtype)
    missing = missing_images(folder, prior)
    requests = [dataclasses.replace(first, seed=i) for i in missing]
    with tempfile.TemporaryDirectory() as scratch:
        for position, image in generate(family, requests, device=device, dtype=dtype, progress=progress):
            file = Path(scratch, file_name(missing[position]))
            save_png(image, file, {**recipe, "seed": missing[position]})
            folder.upload(file, file.name)
            file.unlink()
    return folder


def plan(family: DiffusionFamily, prior: PriorPreservation, dtype: torch.dtype) -> tuple[Request, dict[str, Any]]:
    """The first picture, and all that decides what pictures of this prior show."""
    from gtl.generate.engine import Request

    height, width = family.default_size
    first = Request(prior.prompt, height, width, steps=prior.steps, guidance=prior.guidance)
    name = str(dtype).removeprefix("torch.")
    return first, {**dataclasses.asdict(first), "model": family.fingerprint(), "dtype": name}


def class_folder(family: DiffusionFamily, prior: PriorPreservation, cache: Store, dtype: torch.dtype) -> Store:
    """Where they belong: named after a hash of all that decides them, so that runs with the same prior share them."""
    _, recipe = plan(family, prior, dtype)
    identity = json.dumps({**recipe, "images": prior.images}, sort_keys=True)
    return cache.sub(f"{FOLDER}/{hashlib.sha256(identity.encode()).hexdigest()[:32]}")


def missing_images(folder: Store, prior: PriorPreservation) -> list[int]:
    """Seeds of those that have not been drawn."""
    there = {key for key, _, _ in folder.list()}
    return [i for i in range(prior.images) if file_name(i) not in there]


def file_name(seed: int) -> str:
    """Of the class image with this seed."""
    return f"{seed:05d}.png"
