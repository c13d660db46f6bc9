"""A run from where it stands to its result, whoever computes its steps: the clock, the looks and what is written."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist

from gtl.config import Recipe
from gtl.config.metrics import OF_OUTCOMES, of_pictures
from gtl.data.dataset import Dataset
from gtl.data.loader import Loader
from gtl.data.plan import Plan
from gtl.evaluate.validation import Validation
from gtl.storage import Store, explained
from gtl.train.assemble import Trainee
from gtl.train.best import best_of
from gtl.train.checkpoint import latest, load, prune, step_key
from gtl.train.checkpoint import save as write_checkpoint
from gtl.train.collapse import collapse_of
from gtl.train.edits import Edits, edits_of
from gtl.train.enlarged import Enlarged, enlarged_of
from gtl.train.flops import peak_flops
from gtl.train.job import CHECKPOINTS, RESULT, Job, Notify
from gtl.train.look import Grid, InTurn, Pictures, Watch, auto_prompts
from gtl.train.loop import Lane, Learner, Wish
from gtl.train.mirror import Mirror, mirror_of
from gtl.train.plan import TrainPlan
from gtl.train.saver import Cadence, Saver
from gtl.train.scores import forget_scores
from gtl.train.track import Tracker, read_rows
from gtl.train.weights import BEST, CANDIDATES, forget, keep, kept, take
from gtl.types import DTYPES

Found = TypeVar("Found")


class Images(NamedTuple):
    """A run's images, and their order."""

    trained: Dataset
    held_out: Dataset
    batches: Plan
    """Of those that are trained on."""


def images_of(recipe: Recipe, dataset: Dataset) -> Images:
    """What a run makes of a dataset.

    Raises:
        UserError: nothing would be left to train on.
    """
    trained, held_out = dataset.split(recipe.data.validation)
    return Images(trained, held_out, Plan(trained.entries, recipe.train.batch_size, recipe.data.seed))


class Course:
    """What goes along with the steps of a run. As a context it has the run's files open."""

    def __init__(
        self, job: Job, recipe: Recipe, trainee: Trainee, engines: Mapping[str, Learner], plan: TrainPlan,
        images: Images, device: torch.device, notify: Notify, used: Callable[[], float],
    ) -> None:  # fmt: skip
        """Load the run's newest checkpoint into the engines. Collective.

        Args:
            job: The run.
            recipe: The job's.
            trainee: The model, with what moves in it.
            engines: By player; what moves in each.
            plan: How the run goes through its steps.
            images: See `images_of`.
            device: Where the process group reduces tensors.
            notify: Is told of every row on rank 0.
            used: Device hours since this part of the run began.
        """
        self._job, self._recipe, self._trainee, self._engines = job, recipe, trainee, engines
        self._plan, self._device, self._notify, self._used = plan, device, notify, used
        done, self._spent = restore(engines, job.run, device)
        self._tracker: Tracker | None = None
        self._saver, self._stack = Saver(), ExitStack()
        self._has_enough, self._collapse = False, collapse_of(recipe)
        self._look = make_watch(job, recipe, trainee, engines, plan, images, device, done, self._keep)
        peak = peak_flops(device, getattr(torch, DTYPES[job.dtype]))
        every = recipe.train.checkpoints.every
        self._cadence = Cadence(every, done, self._saver)
        save, report, waits = self._save, self._report, bool(job.waits)
        self.lane = Lane(recipe.train.seed, every, save, report, self._look, device, peak, done, save_looks=waits)
        self.batches = make_loader(images.trained, images.batches, trainee, plan, recipe.data.seed, done, device)

    def __enter__(self) -> Course:
        with ExitStack() as stack:
            if dist.get_rank() == 0:
                self._tracker = stack.enter_context(Tracker(self._job.run, self.lane.done))
            stack.enter_context(self._saver)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Everything is written."""
        self._stack.__exit__(kind, error, trace)

    def finish(self) -> None:
        """Export what was learned and write the result, if nothing is left to learn. Collective; the files are closed.

        Raises:
            UserError: a store fails.
        """
        done = self.lane.done
        dist.barrier()  # rank 0 has written everything
        if done < self._plan.steps and not self._look.enough and not of_first(lambda: self._has_enough, self._device):
            return
        kind = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else "cpu"
        result = {"steps": done, "device": kind, "device_hours": self._hours(), **self._look.verdict}
        finish(self._job, self._recipe, self._trainee, self._engines, result)

    def _hours(self) -> float:
        return self._spent + self._used()

    def _keep(self, step: int, is_best: bool) -> None:
        keep(self._engines, self._job, self._trainee, step, is_best, self._saver)

    def _report(self, row: dict[str, float]) -> Wish | None:
        assert self._tracker is not None
        step, seconds = int(row["step"]), row.get("step_seconds")
        self._saver.check()
        self._cadence.hold(step)
        row = self._collapse.seen(row)
        self._tracker.log(row)
        if warning := self._collapse.warning():
            self._notify({"step": row["step"], "said": warning, "of": "collapse"})
        wish = self._notify({**row, "steps": self._plan.steps})
        self._has_enough |= wish == "enough"
        # What others go on from is saved at its looks, and between them only if somebody asks.
        if wish is None and seconds and not self._job.waits and self._cadence.is_early(step, seconds):
            return "save"
        return "stop" if wish == "enough" else wish

    def _save(self, step: int) -> None:
        if self._tracker is not None:
            self._tracker.flush()  # first: who goes on from the checkpoint finds the rows that lead to it
        keeps = self._recipe.train.checkpoints.keep
        save(self._engines, self._job, self._plan, step, self._hours(), CHECKPOINTS, keeps, self._saver)
        self._cadence.begin(step)


def make_loader(
    dataset: Dataset, batches: Plan, trainee: Trainee, plan: TrainPlan, seed: int, first_step: int,
    device: torch.device,
) -> Loader:  # fmt: skip
    """This rank's micro-batches from `first_step` to the end of the run."""
    return Loader(
        dataset, batches, trainee.objective.draw, trainee.objective.collate, rank=dist.get_rank(),
        world=dist.get_world_size(), micro_batch=plan.micro_batch, first_step=first_step, last_step=plan.steps,
        seed=seed, pin=device.type == "cuda",
    )  # fmt: skip


def make_watch(
    job: Job, recipe: Recipe, trainee: Trainee, engines: Mapping[str, Learner], plan: TrainPlan,
    images: Images, device: torch.device, done: int, keep: Callable[[int, bool], None],
) -> Watch:  # fmt: skip
    """What looks at the model from time to time."""
    trained, held_out, _ = images
    validation = Validation(
        held_out, trainee.objective, batch_size=plan.micro_batch, rank=dist.get_rank(), world=dist.get_world_size(),
        seed=recipe.data.seed,
    )  # fmt: skip
    shown, scoring, best = recipe.evaluate, None, best_of(recipe)
    grid: Grid | Mirror | Enlarged | Edits | None = None
    rows: list[dict[str, Any]] = of_first(lambda: read_rows(job.run), device) if done else []
    measured = ("val_loss", *OF_OUTCOMES, *recipe.at_looks.metrics)
    seen = next(({m: row[m] for m in measured if m in row} for row in rows if row["step"] == done), {})
    pictures = Pictures(
        recipe.at_looks, recipe.sampler, trainee, trained, device, getattr(torch, DTYPES[job.dtype])
    )  # fmt: skip
    if not recipe.pair.draws and shown.prompts != []:
        show = edits_of if recipe.needs.originals else mirror_of
        grid = show(pictures, held_out, trained)
    if recipe.pair.draws and not trainee.family.draws_alone:
        grid = enlarged_of(pictures, held_out, trained) if shown.prompts != [] else None
    elif recipe.pair.draws:
        prompts = auto_prompts(held_out, trained, trainee.family) if shown.prompts == "auto" else shown.prompts
        size = max(recipe.data.resolution // trainee.family.multiple, 1) * trainee.family.multiple
        grid = Grid(pictures, prompts, size) if prompts else None
        if recipe.at_looks.metrics and not job.beside:
            scoring = make_scoring(job, recipe, pictures)
    if job.beside and best is not None and of_pictures([best.metric]):
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

    family, cache, asked = pictures.trainee.family, recipe.storage.cache, recipe.at_looks
    images = of_first(lambda: reference(recipe.data, family, cache), pictures.device)
    sampling = plan(asked, images, job.dtype)
    turn = Turn(
        asked, family, images, sampling, recipe.sampler, Store(cache), pictures.device, pictures.dtype
    )  # fmt: skip
    base = {"source": recipe.model.source, "fingerprint": job.base}
    return InTurn(pictures, turn, f"{job.name}@{job.version}", base)


def of_first(find: Callable[[], Found], device: torch.device) -> Found:
    """What rank 0 finds, on every rank: the others may see a store as it was a moment ago. Collective."""
    found = [find() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0, device=device)
    return cast(Found, found[0])


def restore(engines: Mapping[str, Learner], run: Store, device: torch.device) -> tuple[int, float]:
    """Load the run's newest checkpoint into the engines; the steps and device hours behind it. Collective."""
    key = of_first(lambda: latest(run, CHECKPOINTS), device)
    if key is None:
        return 0, 0.0
    checkpoint = load(run, key, {name: engine.shapes for name, engine in engines.items()})
    for name, engine in engines.items():
        engine.load_state(checkpoint.steps(name), checkpoint.tensors(name))
    return checkpoint.step, checkpoint.manifest["device_hours"]


def save(
    engines: Mapping[str, Learner], job: Job, plan: TrainPlan, step: int, device_hours: float, folder: str, keep: int,
    saver: Saver,
) -> None:  # fmt: skip
    """Copy the state of a step and begin to write it into a folder of the run, where the newest `keep` stay.

    Collective.
    """
    saver.wait()  # before the next state is copied: there is memory for one
    states = {name: engine.state() for name, engine in engines.items()}
    if dist.get_rank() != 0:
        return
    manifest = {"step": step, "dataset": job.dataset, "base": job.base, "stage": plan.stage,
                "workers": dist.get_world_size(), "device_hours": device_hours}  # fmt: skip

    def commit() -> None:
        write_checkpoint(job.run, step_key(folder, step), states, manifest)
        prune(job.run, folder, keep)

    saver.submit(commit)


def finish(job: Job, recipe: Recipe, trainee: Trainee, engines: Mapping[str, Learner], result: dict[str, Any]) -> None:
    """Export what was learned and write the run's result, which marks it as finished. Collective; rank 0 writes."""
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
    last, first = read_rows(job.run)[-1], next(iter(engines))
    losses = (last.get(key) for key in ("loss", f"{trainee.family.main}_loss", f"{first}_loss"))
    result = {**result, "final_loss": next((loss for loss in losses if loss is not None), None)}
    job.run.write(RESULT, json.dumps(result).encode())
