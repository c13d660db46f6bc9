"""One training process: from a job to trained weights. Runs in a Ray Train worker or in any process group."""

from __future__ import annotations

import os
import platform
import time
from typing import TYPE_CHECKING, Any, Literal

from gtl import __version__
from gtl.config import Recipe, parse_recipe
from gtl.storage import Store
from gtl.train.board import Post
from gtl.train.job import Job, Notify
from gtl.types import UserError

if TYPE_CHECKING:
    import torch

    from gtl.families.base import Family
    from gtl.train.assemble import Trainee
    from gtl.train.engine import Engine
    from gtl.train.loop import Wish
    from gtl.train.plan import TrainPlan

PAUSE_S = 0.1
"""Between two questions whether a run may go on from a look."""


def main(config: dict[str, Any]) -> None:
    """Entry of a Ray Train worker, also of one that takes the place of another that died."""
    import ray
    import ray.train
    import ray.train.torch
    import torch
    from ray.train.v2._internal.execution.context import get_train_context

    from gtl.train.halve import HalvedError, too_large

    board = config["board"]
    post, notices = Post(board), list[Any]()
    waits, looked = config["job"]["waits"], 0.0

    def notify(row: dict[str, float]) -> Wish | Literal["enough"] | None:
        """What waits at a look does so here, a step behind it: by then the look's state is saved."""
        nonlocal looked
        while looked and not ray.get(board.may_go_on.remote(looked)):
            time.sleep(PAUSE_S)
        looked = row["step"] if waits and all(name in row for name in waits) else 0.0
        if wish := post(row):
            return wish
        # `ray.train.get_preemption_info` asks all ranks, which takes longer than many a step; one is enough to know.
        notice = get_train_context().preemption_context.preemption_info
        if notice is None or notice in notices:
            return None
        notices.append(notice)
        return "save"

    if ray.get(board.mistake.remote()):
        return  # Ray Train starts the workers again after any error; this one is the user's to mend
    try:
        run(Job(**config["job"]), ray.train.torch.get_device(), notify)
        post.finish()
    except UserError as error:
        ray.get(board.post_mistake.remote(str(error)))
        raise  # the other ranks may wait for this one; Ray Train ends them all
    except HalvedError as error:
        ray.get(board.push.remote({"step": 0.0, "said": str(error), "of": "memory"}))
        raise
    except torch.OutOfMemoryError:  # before there was a batch
        ray.get(board.post_mistake.remote(too_large(parse_recipe(config["job"]["recipe"]))))
        raise


def run(job: Job, device: torch.device, notify: Notify) -> None:
    """Train to the last step or until somebody asks to stop. Collective; the process group stands already.

    Leaves metrics, checkpoints, the exported adapter and, last of all, `RESULT` in the run's folder.

    Raises:
        HalvedError: a device has no room for the micro-batch; new workers go on with half of it.
        UserError: versions or models differ, the model does not fit the recipe, the loss diverges, a store fails.
    """
    import torch.distributed as dist

    from gtl.config.objectives import AlignObjective
    from gtl.data.dataset import Dataset
    from gtl.data.plan import check_domains
    from gtl.train.assemble import assemble
    from gtl.train.course import Course, images_of, of_first
    from gtl.train.halve import halving, limit, read_limit
    from gtl.train.loop import stop_on_signals, train

    if job.code != __version__:
        raise UserError(f"gtl {__version__} on a worker, {job.code} where the run was started; install one version")
    recipe, begun = parse_recipe(job.recipe), time.monotonic()
    images = images_of(recipe, Dataset.load(Store(recipe.storage.cache), job.dataset))
    trainee = assemble(recipe, job.dtype)
    check_base(trainee.family, job)
    plan = settle(recipe, trainee.family, device, job.dtype, images.batches.steps_per_epoch)
    plan = limit(plan, recipe, dist.get_world_size(), of_first(lambda: read_limit(job.run), device))
    if isinstance(recipe.objective, AlignObjective):
        entries, fewest = images.trained.entries, recipe.objective.fewest
        check_domains(entries, recipe.train.batch_size, fewest, dist.get_world_size(), plan.micro_batch)
    engines = make_engines(trainee, recipe, plan, device)

    def used() -> float:
        return (time.monotonic() - begun) / 3600 * dist.get_world_size()

    course = Course(job, recipe, trainee, engines, plan, images, device, notify, used)
    with course, stop_on_signals(course.lane), halving(job.run, recipe, plan):
        train(engines, course.batches, course.lane)
    course.finish()


def check_base(family: Family, job: Job) -> None:
    """Compare the model on this machine with the launcher's; one rank of a machine does, since that reads all of it.

    Raises:
        UserError: its files are others.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    if (found := family.fingerprint()) != job.base:
        raise UserError(
            f"model.source: {job.recipe['model']['source']}: its files on the worker {platform.node()} ({found[:12]}) "
            f"are not those where the run was started ({job.base[:12]}); give all machines the same model"
        )


def settle(recipe: Recipe, family: Family, device: torch.device, dtype: str, steps_per_epoch: int) -> TrainPlan:
    """The plan of this run on these workers; the same on every rank."""
    import torch
    import torch.distributed as dist

    from gtl.train.plan import Memory, choose

    memory, asked = None, recipe.train
    if device.type == "cuda" and "auto" in (asked.zero.stage, asked.micro_batch):
        from gtl.train.assemble import outline
        from gtl.train.footprint import measure

        smallest = torch.tensor(torch.cuda.get_device_properties(device).total_memory, device=device)
        dist.all_reduce(smallest, dist.ReduceOp.MIN)
        memory = Memory(measure(recipe, outline(recipe, dtype, family), "cuda"), int(smallest))
    return choose(recipe, workers=dist.get_world_size(), steps_per_epoch=steps_per_epoch, memory=memory)


def make_engines(trainee: Trainee, recipe: Recipe, plan: TrainPlan, device: torch.device) -> dict[str, Engine]:
    """One engine a player, with those of the trained parameters that are in it. Collective."""
    from gtl.train.engine import Engine

    engines = {}
    for name, player in trainee.players.items():
        inside = {id(tensor) for tensor in (*player.parameters(), *player.buffers())}
        own = {key: parameter for key, parameter in trainee.parameters.items() if id(parameter) in inside}
        buffers = {key: buffer for key, buffer in trainee.buffers.items() if id(buffer) in inside}
        memory = {key: buffer for key, buffer in player.named_buffers(recurse=False)}
        known = {id(parameter) for parameter in trainee.parameters.values()}
        aids = {key: p for key, p in player.named_parameters() if p.requires_grad and id(p) not in known}
        engines[name] = Engine(
            player, own, recipe.train_of(name), stage=plan.stage, micro_batch=plan.micro_batch,
            accumulation=plan.accumulation, device=device, total_steps=plan.steps, dtype=trainee.dtype,
            buffers=buffers, memory=memory, aids=aids,
        )  # fmt: skip
    return engines
