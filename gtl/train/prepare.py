"""What is made once before training: class images and the encoded dataset."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gtl.config import Recipe
from gtl.config.objectives import DenoiseObjective, PriorPreservation
from gtl.session import get
from gtl.storage import Store
from gtl.train.board import make_board
from gtl.types import DTYPES, Progress

if TYPE_CHECKING:
    from gtl.data.dataset import Dataset
    from gtl.families.base import DiffusionFamily


def prepare(recipe: Recipe, family: DiffusionFamily, dtype: str, gpus: int, progress: Progress) -> Dataset:
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
    from gtl.data.prepare import check_sources
    from gtl.data.prepare import prepare as encode

    @functools.cache
    def check() -> None:
        """What workers would find out only after hours of drawing and encoding."""
        from gtl.train.assemble import outline

        outline(recipe, dtype, family)

    objective, cache = recipe.objective, recipe.storage.cache
    prior = objective.prior if isinstance(objective, DenoiseObjective) else None
    extra = None
    if prior is not None:
        check_sources(recipe.data)
        extra = (draw_on_cluster(family, prior, cache, dtype, gpus, check, progress), prior.prompt, prior.weight)
    shown = recipe.evaluate
    prompts = [family.negative_text(shown.negative_prompt)]
    if isinstance(shown.prompts, list):
        prompts += shown.prompts
    return encode(
        recipe.data, family, cache, dtype=dtype, needs=recipe.needs, prior=extra, prompts=prompts, check=check,
        progress=progress,
    )  # fmt: skip


def draw_on_cluster(
    family: DiffusionFamily, prior: PriorPreservation, cache: str, dtype: str, gpus: int, check: Callable[[], None],
    progress: Progress,
) -> str:  # fmt: skip
    """Draw the class images that are missing where the GPUs are, after a check; the folder's URL."""
    import ray
    import torch

    from gtl.generate.class_images import class_folder, missing_images

    folder = class_folder(family, prior, Store(cache), getattr(torch, DTYPES[dtype]))
    if not missing_images(folder, prior):
        return folder.url()
    check()
    board = make_board()
    task = ray.remote(num_cpus=1, num_gpus=gpus)(draw).remote(family, prior, cache, dtype, board)
    ended = False
    while not ended:
        ended = bool(ray.wait([task], timeout=0.25)[0])
        for row in ray.get(board.take.remote())[-1:]:
            progress("class images", row["done"], row["total"])
    url: str = get(task)
    return url


def draw(family: DiffusionFamily, prior: PriorPreservation, cache: str, dtype: str, board: Any) -> str:
    """The task behind `draw_on_cluster`."""
    import ray
    import torch

    from gtl.generate.class_images import class_images

    def post(phase: str, done: int, total: int, detail: str = "") -> None:
        if phase == "draw":
            ray.get(board.push.remote({"done": done, "total": total}))

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch_dtype = getattr(torch, DTYPES[dtype])
    return class_images(family, prior, Store(cache), device=device, dtype=torch_dtype, progress=post).url()
