"""Class images for prior preservation (Ruiz et al. 2022, arXiv 2208.12242): drawn once by the base model, then kept."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from contextlib import closing
from typing import TYPE_CHECKING

from gtl.config.objectives import PriorPreservation
from gtl.storage import Store
from gtl.types import DTYPES, Progress

if TYPE_CHECKING:
    from gtl.families.base import DiffusionFamily
    from gtl.generate.request import Request
    from gtl.generate.spread import Origin

FOLDER = "class_images"
"""In the cache."""


def class_images(
    family: DiffusionFamily,
    origin: Origin,
    prior: PriorPreservation,
    cache: Store,
    *,
    dtype: str,
    gpus: int | None = None,
    progress: Progress | None = None,
) -> Store:
    """The folder in the cache with `prior.images` pictures of the prior's prompt; draws those that are missing.

    A run goes on where another was cut off. Two runs at once write the same files, each of them whole.

    Args:
        family: The base model, and `origin` is where every machine of the connected cluster finds it.
        origin: See `family`.
        prior: What to draw.
        cache: Where the folder is or will be.
        dtype: fp32 or bf16, of the weights and the arithmetic.
        gpus: See `spread`.
        progress: Is called as it goes on.

    Raises:
        UserError: the prior's settings or the model's files are wrong, or the cache cannot be written.
    """
    from gtl.generate.spread import Model, Order, spread

    folder = class_folder(family, prior, cache, dtype)
    first, beside = plan(family, prior, dtype)
    missing = missing_images(folder, prior)
    model = Model(origin, family.fingerprint(), dtype=dtype)
    orders = [Order(model, dataclasses.replace(first, seed=seed), beside) for seed in missing]
    with closing(spread(orders, gpus=gpus, progress=progress)) as files:
        for position, png in files:
            folder.write(file_name(missing[position]), png)
    return folder


def plan(family: DiffusionFamily, prior: PriorPreservation, dtype: str) -> tuple[Request, dict[str, str]]:
    """The first picture, and what decides beside the request what pictures of this prior show."""
    from gtl.generate.request import Request

    height, width = family.default_size
    first = Request(prior.prompt, height, width, steps=prior.steps, guidance=prior.guidance)
    return first, {"model": family.fingerprint(), "dtype": DTYPES[dtype]}


def class_folder(family: DiffusionFamily, prior: PriorPreservation, cache: Store, dtype: str) -> Store:
    """Where they belong: named after a hash of all that decides them, so that runs with the same prior share them."""
    first, beside = plan(family, prior, dtype)
    identity = json.dumps({**dataclasses.asdict(first), **beside, "images": prior.images}, sort_keys=True)
    return cache.sub(f"{FOLDER}/{hashlib.sha256(identity.encode()).hexdigest()[:32]}")


def missing_images(folder: Store, prior: PriorPreservation) -> list[int]:
    """Seeds of those that have not been drawn."""
    there = {key for key, _, _ in folder.list()}
    return [i for i in range(prior.images) if file_name(i) not in there]


def file_name(seed: int) -> str:
    """Of the class image with this seed."""
    return f"{seed:05d}.png"
