"""What is made once before training: class images and the encoded dataset."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from gtl.config import Recipe
from gtl.config.objectives import AlignObjective, DenoiseObjective, PriorPreservation
from gtl.families import denoising
from gtl.storage import Store
from gtl.types import Progress, UserError

if TYPE_CHECKING:
    from gtl.data.dataset import Dataset
    from gtl.families.base import Family


def prepare(recipe: Recipe, family: Family, dtype: str, gpus: int, progress: Progress) -> Dataset:
    """Draw the class images and encode the images and captions that the cache lacks, on the cluster.

    Args:
        recipe: What to train on.
        family: The opened model.
        dtype: fp32 or bf16, of the frozen weights.
        gpus: GPUs of one worker, 0 or 1.
        progress: Is called as it goes on.

    Raises:
        UserError: the data, the model or the cache is not what it has to be, or the recipe does not fit the model.
    """
    from gtl.data.plan import check_domains
    from gtl.data.prepare import check_sources
    from gtl.data.prepare import prepare as encode

    @functools.cache
    def check() -> None:
        """What workers would find out only after hours of drawing and encoding."""
        from gtl.train.assemble import outline

        outline(recipe, dtype, family)

    check_drawn(recipe, family)
    objective, cache = recipe.objective, recipe.storage.cache
    prior = objective.prior if isinstance(objective, DenoiseObjective) else None
    target = objective.target if isinstance(objective, AlignObjective) else None
    extra = None
    if prior is not None:
        check_sources(recipe.data)
        folder = draw_class_images(recipe, family, prior, dtype, gpus, check, progress)
        extra = (folder, prior.prompt, prior.weight)
    shown = recipe.evaluate
    draws = family.draws == "by denoising" and family.encoders
    prompts = [denoising(family).negative_text(shown.negative_prompt)] if draws else []
    if isinstance(shown.prompts, list):
        prompts += shown.prompts
    dataset = encode(
        recipe.data, family, cache, dtype=dtype, needs=recipe.needs, prior=extra, target=target, prompts=prompts,
        check=check, progress=progress,
    )  # fmt: skip
    if isinstance(objective, AlignObjective):
        check_domains(dataset.entries, recipe.train.batch_size, max(objective.fewest, 1))
    return dataset


def check_drawn(recipe: Recipe, family: Family) -> None:
    """Refuse to measure pictures, or to learn from pictures, of a model that draws none by itself.

    Raises:
        UserError: names the key.
    """
    if family.draws_alone:
        return
    why = f"a model of family {family.name} only enlarges pictures, and has none of its own"
    if metrics := recipe.at_looks.metrics:
        raise UserError(f"evaluate.beside.metrics: {metrics[0]}: {why}; leave it to val_loss")
    if isinstance(recipe.objective, DenoiseObjective) and recipe.objective.prior is not None:
        raise UserError(f"objective.prior: {recipe.objective.prior.prompt!r}: {why}; leave it out")


def draw_class_images(
    recipe: Recipe, family: Family, prior: PriorPreservation, dtype: str, gpus: int,
    check: Callable[[], None], progress: Progress,
) -> str:  # fmt: skip
    """Draw the class images that are missing, after a check; the folder's URL."""
    from gtl.generate.class_images import class_folder, class_images, missing_images
    from gtl.generate.spread import Origin

    cache = Store(recipe.storage.cache)
    family = denoising(family)
    folder = class_folder(family, prior, cache, dtype)
    if missing_images(folder, prior):
        check()

        def show(phase: str, done: int, total: int, detail: str = "") -> None:
            progress("class images", done, total, detail)

        origin = Origin(recipe.model.source, recipe.model.revision, recipe.model.variant)
        class_images(family, origin, prior, cache, dtype=dtype, gpus=gpus, progress=show)
    return folder.url()
