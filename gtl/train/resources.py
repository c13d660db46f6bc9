"""What a run takes from the cluster."""

from __future__ import annotations

from dataclasses import dataclass

from gtl.config import Recipe
from gtl.data.plan import num_fills
from gtl.session import Cluster
from gtl.train.plan import check_groups, choose, repeats_of
from gtl.types import UserError


@dataclass(frozen=True)
class Resources:
    """What one run takes from the cluster."""

    workers: int | tuple[int, int]
    """So many, or the fewest and the most."""
    gpus_per_worker: int
    cpus_per_worker: float
    dtype: str
    """Of the frozen weights and the arithmetic: fp32 or bf16."""


def choose_resources(recipe: Recipe, cluster: Cluster) -> Resources:
    """Resolve `auto` against the cluster.

    Raises:
        UserError: the cluster can never hold the workers, train.zero does not suit them, or a library is missing.
    """
    asked = recipe.train
    gpus = (1 if cluster.gpus else 0) if asked.gpus_per_worker == "auto" else asked.gpus_per_worker
    workers = (max(int(cluster.gpus), 1) if gpus else 1) if asked.workers == "auto" else asked.workers
    fewest = workers[0] if isinstance(workers, tuple) else workers
    if fewest * gpus > cluster.gpus:
        raise UserError(
            f"train.workers: {fewest} workers with {gpus} GPU each need {fewest * gpus} GPUs; the cluster has "
            f"{cluster.gpus:g} (train.gpus_per_worker: 0 trains on CPUs)"
        )
    if fewest * asked.cpus_per_worker > cluster.cpus:
        raise UserError(
            f"train.workers: {fewest} workers with {asked.cpus_per_worker:g} CPUs each need "
            f"{fewest * asked.cpus_per_worker:g} CPUs; the cluster has {cluster.cpus:g}"
        )
    check_groups(asked.zero.hpz, workers)
    if recipe.model.quantization is not None:  # before hours of encoding
        from gtl.train.quantize import check_library

        check_library(recipe.model.quantization)
    dtype = recipe.model.dtype
    resolved = ("bf16" if gpus else "fp32") if dtype == "auto" else dtype
    return Resources(workers, gpus, asked.cpus_per_worker, resolved)


def describe(recipe: Recipe, resources: Resources) -> str:
    """How many workers, and what becomes of a batch that they cannot share out evenly.

    On GPUs `train.micro_batch: auto` is settled by the workers, who know their memory; the least is told here.
    """
    batch_size, asked, workers = recipe.train.batch_size, recipe.train.micro_batch, resources.workers
    fewest, most = workers if isinstance(workers, tuple) else (workers, workers)
    is_settled = not resources.gpus_per_worker or asked != "auto"

    def fills(number: int) -> int:
        micro_batch = choose(recipe, workers=number, steps_per_epoch=1).micro_batch if is_settled else 1
        return num_fills(batch_size, number, micro_batch)

    spare = max(fills(number) for number in range(fewest, most + 1))
    bound = "at least " if not is_settled else "up to " if fewest < most else ""
    filled = f", whose batches of {batch_size} are filled up with {bound}{repeats_of(spare)}" if spare else ""
    return f"{fewest} to {most}{filled}" if fewest < most else f"{fewest}{filled}"
