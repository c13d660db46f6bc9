"""One training process: from a job to trained weights. Runs in a Ray Train worker or in any process group."""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from gtl import __version__
from gtl.config import Recipe, parse_recipe
from gtl.storage import Store, explained
from gtl.types import DTYPES, UserError

if TYPE_CHECKING:
    import torch

    from gtl.data.dataset import Dataset
    from gtl.data.loader import Loader
    from gtl.data.plan import Plan
    from gtl.families.base import DiffusionFamily
    from gtl.train.assemble import Trainee
    from gtl.train.engine import Engine
    from gtl.train.look import InTurn, Pictures, Watch
    from gtl.train.loop import Wish
    from gtl.train.plan import TrainPlan
    from gtl.train.saver import Saver

CHECKPOINTS = "checkpoints"
RESULT = "result.json"
"""In a run's folder, written last: all steps are made and the adapter is exported."""

PAUSE_S = 0.1
"""Between two questions whether a run may go on from a look."""

Found = TypeVar("Found")
Notify = Callable[[dict[str, float]], "Wish | Literal['enough'] | None"]
"""Takes a row of metrics on rank 0; returns what somebody asks of the run, if anything. enough: to save and stop as one
whose last step was made."""


@dataclass(frozen=True)
class Job:
    """What a worker needs, settled once by the launcher; plain values, so that it travels."""

    recipe: dict[str, Any]
    name: str
    version: str
    dataset: str
    """Fingerprint of the prepared dataset in the cache."""
    base: str
    """Fingerprint of the base model."""
    dtype: str
    """Of the frozen weights: fp32 or bf16."""
    beside: bool = False
    """Whether others measure the pictures of every look's weights, instead of the workers in turn with training."""
    waits: tuple[str, ...] = ()
    """Metrics of the looks from which the run goes on only when it is let; none: it waits for nobody."""
    code: str = __version__

    @property
    def run(self) -> Store:
        """The run's folder."""
        return Store(f"{self.recipe['storage']['runs']}/{self.name}/{self.version}")


def main(config: dict[str, Any]) -> None:
    """Entry of a Ray Train worker, also of one that takes the place of another that died."""
    import ray
    import ray.train
    import ray.train.torch
    import torch
    from ray.train.v2._internal.execution.context import get_train_context

    from gtl.train.halve import HalvedError, no_room

    board, pending = config["board"], []
    notices: list[Any] = []
    waits, looked = config["job"]["waits"], 0.0

    def notify(row: dict[str, float]) -> Wish | Literal["enough"] | None:
        """Post a row without waiting; the answer to an earlier one is soon enough.

        What waits at a look does so here, a step behind it: by then the look's state is saved.
        """
        nonlocal looked
        while looked and not ray.get(board.may_go_on.remote(looked)):
            time.sleep(PAUSE_S)
        looked = row["step"] if waits and all(name in row for name in waits) else 0.0
        pending.append(board.push.remote(row))
        answered, pending[:] = ray.wait(pending, num_returns=len(pending), timeout=0)
        if wishes := [wish for wish in ray.get(answered) if wish]:
            return wishes[-1]
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
        ray.get(pending)
    except UserError as error:
        ray.get(board.post_mistake.remote(str(error)))
        raise  # the other ranks may wait for this one; Ray Train ends them all
    except HalvedError as error:
        ray.get(board.push.remote({"step": 0.0, "said": str(error), "of": "memory"}))
        raise
    except torch.OutOfMemoryError:  # before there was a batch
        recipe = parse_recipe(config["job"]["recipe"])
        ray.get(board.post_mistake.remote(f"model.source: {recipe.model.source}: {no_room(recipe)}"))
        raise


def run(job: Job, device: torch.device, notify: Notify) -> None:
    """Train to the last step or until somebody asks to stop. Collective; the process group stands already.

    Leaves metrics, checkpoints, the exported adapter and, last of all, `RESULT` in the run's folder.

    Raises:
        HalvedError: a device has no room for the micro-batch; new workers go on with half of it.
        UserError: versions or models differ, the model does not fit the recipe, the loss diverges, a store fails.
    """
    import torch
    import torch.distributed as dist

    from gtl.data.dataset import Dataset
    from gtl.data.plan import Plan
    from gtl.train.assemble import assemble
    from gtl.train.flops import peak_flops
    from gtl.train.halve import halving, limit, read_limit
    from gtl.train.loop import Lane, stop_on_signals, train
    from gtl.train.saver import Saver
    from gtl.train.track import Tracker
    from gtl.train.weights import keep

    if job.code != __version__:
        raise UserError(f"gtl {__version__} on a worker, {job.code} where the run was started; install one version")
    recipe, begun = parse_recipe(job.recipe), time.monotonic()
    dataset, held_out = Dataset.load(Store(recipe.storage.cache), job.dataset).split(recipe.data.validation)
    batches = Plan(dataset.entries, recipe.train.batch_size, recipe.data.seed)
    trainee = assemble(recipe, job.dtype)
    check_base(trainee.family, job)
    plan = settle(recipe, trainee.family, device, job.dtype, batches.steps_per_epoch)
    plan = limit(plan, recipe, dist.get_world_size(), of_first(lambda: read_limit(job.run), device))
    engines = make_engines(trainee, recipe, plan, device)
    done, spent = restore(engines, job.run, device)

    def device_hours() -> float:
        return spent + (time.monotonic() - begun) / 3600 * dist.get_world_size()

    saver = Saver()

    def keep_weights(step: int, is_best: bool) -> None:
        keep(engines, job, trainee, step, is_best, saver)

    look = make_watch(job, recipe, trainee, engines, plan, (dataset, held_out), device, done, keep_weights)
    has_enough = False
    with ExitStack() as stack:
        tracker = stack.enter_context(Tracker(job.run, done)) if dist.get_rank() == 0 else None
        stack.enter_context(saver)

        def report(row: dict[str, float]) -> Wish | None:
            nonlocal has_enough
            assert tracker is not None
            saver.check()
            tracker.log(row)
            wish = notify({**row, "steps": plan.steps})
            has_enough |= wish == "enough"
            return "stop" if wish == "enough" else wish

        def save_all(step: int) -> None:
            if tracker is not None:
                tracker.flush()  # first: who goes on from the checkpoint finds the rows that lead to it
            save(engines, job, plan, step, device_hours(), CHECKPOINTS, recipe.train.checkpoints.keep, saver)

        peak = peak_flops(device, getattr(torch, DTYPES[job.dtype]))
        lane = Lane(recipe.train.seed, recipe.train.checkpoints.every, save_all, report, look, device, peak, done)
        loader = make_loader(dataset, batches, trainee, plan, recipe.data.seed, done, device)
        with stop_on_signals(lane), halving(job.run, recipe, plan):
            done = train(engines, loader, lane)
    dist.barrier()  # rank 0 has written everything
    if done < plan.steps and not look.enough and not of_first(lambda: has_enough, device):
        return
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    result = {"steps": done, "device": kind, "device_hours": device_hours(), **look.verdict}
    finish(job, recipe, trainee, engines, result, device)


def check_base(family: DiffusionFamily, job: Job) -> None:
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


def settle(
    recipe: Recipe, family: DiffusionFamily, device: torch.device, dtype: str, steps_per_epoch: int
) -> TrainPlan:
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
        inside = {id(parameter) for parameter in player.parameters()}
        own = {key: parameter for key, parameter in trainee.parameters.items() if id(parameter) in inside}
        engines[name] = Engine(
            player, own, recipe.train, stage=plan.stage, micro_batch=plan.micro_batch,
            accumulation=plan.accumulation, device=device, total_steps=plan.steps, dtype=trainee.dtype,
        )  # fmt: skip
    return engines


def make_loader(
    dataset: Dataset, batches: Plan, trainee: Trainee, plan: TrainPlan, seed: int, first_step: int,
    device: torch.device,
) -> Loader:  # fmt: skip
    """This rank's micro-batches from `first_step` to the end of the run."""
    import torch.distributed as dist

    from gtl.data.loader import Loader

    return Loader(
        dataset, batches, trainee.objective.draw, trainee.objective.collate, rank=dist.get_rank(),
        world=dist.get_world_size(), micro_batch=plan.micro_batch, first_step=first_step, last_step=plan.steps,
        seed=seed, pin=device.type == "cuda",
    )  # fmt: skip


def make_watch(
    job: Job, recipe: Recipe, trainee: Trainee, engines: Mapping[str, Engine], plan: TrainPlan,
    sides: tuple[Dataset, Dataset], device: torch.device, done: int, keep: Callable[[int, bool], None],
) -> Watch:  # fmt: skip
    """What looks at the model from time to time; `sides` are the images it learns from and those it does not."""
    import torch
    import torch.distributed as dist

    from gtl.evaluate.validation import Validation
    from gtl.train.best import best_of
    from gtl.train.look import Grid, Pictures, Watch, auto_prompts
    from gtl.train.scores import forget_scores
    from gtl.train.track import read_rows
    from gtl.train.weights import BEST, CANDIDATES, forget, kept

    trained, held_out = sides
    validation = Validation(
        held_out, trainee.objective, batch_size=plan.micro_batch, rank=dist.get_rank(), world=dist.get_world_size(),
        seed=recipe.data.seed,
    )  # fmt: skip
    shown, grid, scoring, best = recipe.evaluate, None, None, best_of(recipe)
    rows: list[dict[str, Any]] = of_first(lambda: read_rows(job.run), device) if done else []
    measured = ("val_loss", *recipe.at_looks.metrics)
    seen = next(({m: row[m] for m in measured if m in row} for row in rows if row["step"] == done), {})
    if recipe.needs.text != "none":
        pictures = Pictures(recipe.at_looks, trainee, trained, device, getattr(torch, DTYPES[job.dtype]))
        prompts = auto_prompts(held_out, trained) if shown.prompts == "auto" else shown.prompts
        size = max(recipe.data.resolution // trainee.family.multiple, 1) * trainee.family.multiple
        grid = Grid(pictures, prompts, size) if prompts else None
        if recipe.at_looks.metrics and not job.beside:
            scoring = make_scoring(job, recipe, pictures)
    if job.beside and best is not None and best.metric != "val_loss":
        best = None  # others judge
    if best is not None:
        best.replay(rows, done, of_first(lambda: kept(job.run, BEST), device))
    if dist.get_rank() == 0:
        for folder in (BEST, CANDIDATES):
            forget(job.run, folder, lambda step: step <= done)
        forget_scores(job.run, done)
    return Watch(
        shown.every, plan.steps, job.run, engines, validation, device, grid, scoring, best, keep,
        job.beside and bool(recipe.at_looks.metrics), seen,
    )  # fmt: skip


def make_scoring(job: Job, recipe: Recipe, pictures: Pictures) -> InTurn:
    """What measures pictures while training waits. Collective."""
    from gtl.data.reference import reference
    from gtl.evaluate.sampling import plan
    from gtl.evaluate.turn import Turn
    from gtl.train.look import InTurn

    family, cache, asked = pictures.trainee.family, recipe.storage.cache, recipe.at_looks
    images = of_first(lambda: reference(recipe.data, family, cache), pictures.device)
    sampling = plan(asked, images, job.dtype)
    turn = Turn(asked, family, images, sampling, Store(cache), pictures.device, pictures.dtype)
    base = {"source": recipe.model.source, "fingerprint": job.base}
    return InTurn(pictures, turn, f"{job.name}@{job.version}", base)


def of_first(find: Callable[[], Found], device: torch.device) -> Found:
    """What rank 0 finds, on every rank: the others may see a store as it was a moment ago. Collective."""
    import torch.distributed as dist

    found = [find() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0, device=device)
    return cast(Found, found[0])


def restore(engines: Mapping[str, Engine], run: Store, device: torch.device) -> tuple[int, float]:
    """Load the run's newest checkpoint into the engines; the steps and device hours behind it. Collective."""
    from gtl.train.checkpoint import latest, load

    key = of_first(lambda: latest(run, CHECKPOINTS), device)
    if key is None:
        return 0, 0.0
    checkpoint = load(run, key, {name: engine.shapes for name, engine in engines.items()})
    for name, engine in engines.items():
        engine.load_state(checkpoint.steps(name), checkpoint.tensors(name))
    return checkpoint.step, checkpoint.manifest["device_hours"]


def save(
    engines: Mapping[str, Engine], job: Job, plan: TrainPlan, step: int, device_hours: float, folder: str, keep: int,
    saver: Saver,
) -> None:  # fmt: skip
    """Copy the state of a step and begin to write it into a folder of the run, where the newest `keep` stay.

    Collective.
    """
    import torch.distributed as dist

    from gtl.train.checkpoint import prune, step_key
    from gtl.train.checkpoint import save as write

    saver.wait()  # before the next state is copied: there is memory for one
    states = {name: engine.state() for name, engine in engines.items()}
    if dist.get_rank() != 0:
        return
    manifest = {"step": step, "dataset": job.dataset, "base": job.base, "stage": plan.stage,
                "workers": dist.get_world_size(), "device_hours": device_hours}  # fmt: skip

    def commit() -> None:
        write(job.run, step_key(folder, step), states, manifest)
        prune(job.run, folder, keep)

    saver.submit(commit)


def finish(
    job: Job, recipe: Recipe, trainee: Trainee, engines: Mapping[str, Engine], result: dict[str, Any],
    device: torch.device,
) -> None:  # fmt: skip
    """Export what was learned and write the run's result, which marks it as finished. Collective; rank 0 writes."""
    import torch.distributed as dist

    from gtl.train.track import read_rows
    from gtl.train.weights import BEST, take

    tensors: dict[str, Any] = {}
    best = result.get("best_step")
    for engine in engines.values() if best is None else ():
        tensors |= engine.weights(ema=recipe.train.ema is not None)
    if dist.get_rank() != 0:
        return
    if best is not None:
        take(job.run, BEST, best)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            with explained(temporary):
                trainee.tuner.export(tensors, folder)
            for file in sorted(path for path in folder.rglob("*") if path.is_file()):
                job.run.upload(file, f"adapter/{file.relative_to(folder).as_posix()}")
    result = {**result, "final_loss": read_rows(job.run)[-1].get("loss")}
    job.run.write(RESULT, json.dumps(result).encode())
