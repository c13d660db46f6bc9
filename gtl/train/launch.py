"""From a recipe to a published adapter: checks, prepares, runs the workers on Ray Train, publishes."""

from __future__ import annotations

import importlib
import json
import os
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gtl.adapters import Card, Registry
from gtl.adapters.apply import kind_of
from gtl.adapters.card import Base, DatasetInfo, Lineage, Training, base_of
from gtl.config import Recipe
from gtl.config.load import dump_recipe
from gtl.config.metrics import METRICS
from gtl.config.names import Reference, new_version
from gtl.report.chart import short
from gtl.report.command import write_page
from gtl.session import Cluster, session
from gtl.storage import Store
from gtl.train.beside import Beside, choose_best, is_beside, real_images
from gtl.train.board import Row, Wish, make_board
from gtl.train.job import RESULT, Job
from gtl.train.prepare import prepare
from gtl.train.resources import Resources, choose_resources, describe
from gtl.train.resume import PUBLISHED, check_unchanged, go_on, pin_init, unfinished, was_of
from gtl.train.services import Services
from gtl.train.weights import BEST, CANDIDATES
from gtl.train.worker import main
from gtl.types import Progress, UserError, quiet

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

    from gtl.data.dataset import Dataset
    from gtl.families.base import Family

WAIT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
GROW_S = 60.0
"""Between two looks for machines that came. To take them in costs a new start and the steps since the last checkpoint,
so that several which come one by one are better taken in together."""

STOP_S = 60.0
"""That Ray Train may take to end a run with a mistake in it, which workers that it starts once more leave at once: to
shut Ray down in the midst of a run can crash the process."""


def train(recipe: Recipe, name: str, *, resume: bool | str = False, progress: Progress = quiet) -> Reference:
    """Run a recipe on the cluster and publish what it learned; returns the name and version of that.

    Args:
        recipe: See `gtl.load_recipe`.
        name: Of the run and its adapter.
        resume: Go on with the newest unfinished run of that name, or with this version of it.
        progress: Is called as it goes on.

    Raises:
        UserError: the recipe, the model, the data or the cluster is not what it has to be.
        KeyboardInterrupt: the run was stopped; it has saved, and `resume` goes on with it.
    """
    from gtl.train.copies import warn_of_copies

    runs = Store(f"{recipe.storage.runs}/{name}")
    if resume:
        version = resume if isinstance(resume, str) else unfinished(runs)
        recipe = go_on(runs, version, recipe, progress)
    else:
        recipe = pin_init(recipe)
        version = new_version(dump_recipe(recipe))
    Registry(recipe.storage.registry).versions(name)  # out of reach is better known now than when all is learned
    family = open_model(recipe, progress)
    # Takes seconds, as starting Ray does, which is mostly waiting.
    threading.Thread(target=importlib.import_module, args=("ray.train.torch",), daemon=True).start()
    with session() as cluster:
        start = begin(recipe, name, version, family, cluster, progress)
        beside = is_beside(start.job.run, recipe, start.resources, cluster, progress)
        start = replace(start, job=replace(start.job, beside=beside))
        images = real_images(recipe, family, progress)
        if beside and images is not None:
            with Beside(recipe, start.job, family, images) as companion:
                run_workers(start, progress, companion)
                choose_best(start.job, companion.best())
        else:
            run_workers(start, progress)
        warn_of_copies(recipe, family, start.job.run, start.images)
    published = publish(start, Registry(recipe.storage.registry))
    start.job.run.write(PUBLISHED, published.to_json())
    for folder in (BEST, CANDIDATES):
        start.job.run.delete_folder(folder)
    report(start.job.run)
    return Reference(name, version, 1.0)


@dataclass(frozen=True)
class Start:
    """A run that is ready for its workers."""

    recipe: Recipe
    job: Job
    resources: Resources
    base: Base
    images: int
    """Of the subject that are learned from: neither class images nor those that are held out."""


def begin(
    recipe: Recipe, name: str, version: str, family: Family, cluster: Cluster, progress: Progress
) -> Start:
    """Fill the cache, check that nothing changed since the run was begun, and write its recipe.

    Raises:
        UserError: the recipe, the data or the cluster is not what it has to be.
    """
    base = base_of(family, recipe.model.source, recipe.model.revision)
    check_init(recipe, base)
    resources = choose_resources(recipe, cluster)
    dataset = prepare(recipe, family, resources.dtype, resources.gpus_per_worker, progress)
    values = recipe.model_dump(mode="json")
    job = Job(values, name, version, dataset.fingerprint, base.fingerprint, resources.dtype)
    check_unchanged(job)
    job.run.write("recipe.yaml", dump_recipe(recipe).encode())
    return Start(recipe, job, resources, base, count_learned(dataset, recipe.data.validation))


def train_once(recipe: Recipe, name: str, *, progress: Progress = quiet) -> Reference:
    """`train`, but goes on with the same run if it was stopped, and only names what it published if it is finished.

    Raises:
        UserError: see `train`.
        KeyboardInterrupt: the run was stopped; the same call goes on with it.
    """
    runs = Store(f"{recipe.storage.runs}/{name}")
    base = open_model(recipe, progress).fingerprint()
    same = [version for version in runs.folders() if was_of(runs, version, recipe, base)]
    if same and runs.exists(f"{same[-1]}/{PUBLISHED}"):
        return Reference(name, same[-1], 1.0)
    return train(recipe, name, resume=same[-1] if same else False, progress=progress)


def fill_cache(recipe: Recipe, progress: Progress) -> Dataset:
    """Do what `train` does before it trains: class images and encoded data, in the cache.

    Raises:
        UserError: the recipe, the model, the data or the cluster is not what it has to be.
    """
    family = open_model(recipe, progress)
    with session() as cluster:
        resources = choose_resources(recipe, cluster)
        return prepare(recipe, family, resources.dtype, resources.gpus_per_worker, progress)


def check_init(recipe: Recipe, base: Base) -> None:
    """Refuse to continue from an adapter of another model.

    Raises:
        UserError: it is one.
    """
    if recipe.tuner.init is None:
        return
    theirs = Registry(recipe.storage.registry).show(recipe.tuner.init).base
    if theirs.fingerprint != base.fingerprint:
        raise UserError(
            f"tuner.init: {recipe.tuner.init}: was made for {theirs.source} ({theirs.fingerprint[:12]}); "
            f"the model is {base.source} ({base.fingerprint[:12]})"
        )


def open_model(recipe: Recipe, progress: Progress) -> Family:
    """The recipe's model, without its weights."""
    from gtl.families import open_family

    model = recipe.model
    progress("model", 0, 0, model.source)
    return open_family(model.source, model.family, revision=model.revision, variant=model.variant)


class Companion(Protocol):
    """What goes along with a run's workers."""

    def attach(
        self, ask: Callable[[Wish], object], give_up: Callable[[str], object], let: Callable[[float], object]
    ) -> None:
        """Takes what asks the workers for something, what ends the run because of a mistake of the user's, and what
        lets workers that wait go on from their look at a step."""

    def follow(self, rows: Sequence[Row]) -> list[Row]:
        """Takes the rows that the workers posted; returns rows of its own."""

    def finish(self, progress: Progress) -> list[Row]:
        """All steps are made; returns the last rows of its own."""


def run_workers(
    start: Start, progress: Progress, companion: Companion | None = None,
    elsewhere: Callable[[Job, Any], None] | None = None,
) -> None:  # fmt: skip
    """Run the job's workers to the end, unless they were there before; Ctrl-C and SIGTERM let them save first.

    Args:
        start: The run.
        progress: Is called as it goes on.
        companion: Goes along.
        elsewhere: Trains the job, posting to a board, in the place of workers of its own.

    Raises:
        UserError: a worker met a mistake of the user's.
        KeyboardInterrupt: the run was stopped before its last step; it has saved.
        RuntimeError: a worker failed.
    """
    import ray

    job, resources = start.job, start.resources
    if job.run.exists(RESULT):
        if rows := companion.finish(progress) if companion is not None else []:
            with closing(Services(job, progress)) as services:
                services.is_finished = True
                services.log(rows)
        return
    board = make_board()

    def give_up(mistake: str) -> None:
        board.post_mistake.remote(mistake)
        board.ask.remote("stop")

    if companion is not None:
        companion.attach(board.ask.remote, give_up, board.let.remote)
    failures: list[BaseException] = []

    def fit() -> None:
        try:
            if elsewhere is not None:
                elsewhere(job, board)
                return
            with short_wait(resources.workers):
                make_trainer(job, resources, board).fit()
        except Exception as error:  # handed to the main thread below
            failures.append(error)

    progress("workers", 0, 0, f"starting {describe(start.recipe, resources)}")
    thread = threading.Thread(target=fit, daemon=True)
    with stop_signals(lambda: board.ask.remote("stop")) as stopped:
        thread.start()
        with closing(Services(job, progress)) as services:
            for rows in follow(thread, lambda: ray.get(board.take.remote())):
                rows += companion.follow(rows) if companion is not None else []
                show(rows, progress)
                services.log(rows)
                if mistake := ray.get(board.mistake.remote()):
                    progress("workers", 0, 0, "stopping")
                    thread.join(STOP_S)
                    raise UserError(mistake)
            services.is_finished = job.run.exists(RESULT)
            if services.is_finished and companion is not None:
                services.log(companion.finish(progress))
    if failures:
        raise RuntimeError(f"{job.run.url()}: a worker failed; what it saved stands, --resume goes on") from failures[0]
    if not job.run.exists(RESULT):
        message = f"{job.run.url()}: stopped and saved before its last step; --resume goes on"
        raise KeyboardInterrupt(message) if stopped else RuntimeError(message)


def follow(thread: threading.Thread, take: Callable[[], list[Row]]) -> Iterator[list[Row]]:
    """What a thread's work posts, as it comes; the last time after its end."""
    is_alive = True
    while is_alive:
        thread.join(0.25)
        is_alive = thread.is_alive()
        yield take()


def make_trainer(job: Job, resources: Resources, board: Any) -> TorchTrainer:
    """The Ray Train run of a job. Its name is the version, which no other run has."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    folder = Store(job.run.url().rsplit("/", 1)[0])
    return TorchTrainer(
        main,
        train_loop_config={"job": asdict(job), "board": board},
        scaling_config=ScalingConfig(
            num_workers=resources.workers,  # type: ignore[arg-type]  # a range, too
            use_gpu=bool(resources.gpus_per_worker),
            resources_per_worker={"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker},
            elastic_resize_monitor_interval_s=GROW_S,  # type: ignore[call-arg]  # known to Ray Train v2, which this is
        ),
        run_config=RunConfig(
            name=job.version, storage_path=folder.path(), storage_filesystem=folder.fs,
            failure_config=FailureConfig(max_failures=job.recipe["train"]["max_failures"]),
        ),
    )  # fmt: skip


@contextmanager
def short_wait(workers: int | tuple[int, int]) -> Iterator[None]:
    """Within it Ray Train waits no more than 20 s for the places of as many workers as it believes there is room for.

    What it believes is up to 20 s old, so that it waits for a machine that was just lost, and counts again only then.
    That places are there is known at once; what workers take to start is not part of it. Ray's own default, 60, stays
    where the number of workers is fixed and machines may still be on their way.
    """
    if not isinstance(workers, tuple) or WAIT in os.environ:
        yield
        return
    os.environ[WAIT] = "20"
    try:
        yield
    finally:
        del os.environ[WAIT]


@contextmanager
def stop_signals(ask: Any) -> Iterator[list[int]]:
    """Turn the first Ctrl-C or SIGTERM into a request; a second one ends the process. Yields the signals seen."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return

    def handle(number: int, frame: object) -> None:
        seen.append(number)
        if len(seen) > 1:
            raise KeyboardInterrupt
        ask()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def show(rows: list[Row], progress: Progress) -> None:
    """Progress of the newest row."""
    for row in rows:
        if "said" in row:
            progress(row.get("of", "score"), 0, 0, row["said"])
        elif measured := [f"{name} {short(row[name])}" for name in METRICS if name in row]:
            progress("look", 0, 0, "  ".join([f"step {int(row['step'])}", *measured]))
    if row := next((row for row in reversed(rows) if "images_per_second" in row), {}):
        own = [name for name in row if f"_{name}".endswith("_loss") and name not in METRICS]
        losses = [f"{name.replace('_', ' ')} {row[name]:.4f}" for name in own]
        detail = f"{'  '.join(losses)}  {row['images_per_second']:.2f} images/s"
        progress("train", int(row["step"]), int(row["steps"]), detail)


def publish(
    start: Start, registry: Registry, name: str | None = None, version: str | None = None, **lineage: str
) -> Card:
    """Put a finished run's adapter into a registry, with its card; of one that is there already only the card is read.

    Args:
        start: The run.
        registry: Where to.
        name: Of the adapter; the run's.
        version: Of the adapter; the run's.
        lineage: What else its card says of where it came from.

    Raises:
        UserError: the registry cannot be written.
    """
    job, recipe = start.job, start.recipe
    name, version = name or job.name, version or job.version
    if version in registry.versions(name):  # and then the launcher was cut off
        return registry.show(f"{name}@{version}")
    card = Card(
        name=name, version=version, base=start.base, tuner=recipe.tuner.model_dump(mode="json"),
        objective=recipe.objective.model_dump(mode="json"), sampler=recipe.sampler,
        lineage=Lineage.model_validate({"run": job.run.url(), "init": recipe.tuner.init, **lineage}),
        dataset=DatasetInfo(fingerprint=job.dataset, images=start.images),
        training=Training(**json.loads(job.run.read(RESULT))),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for key, _, _ in job.run.list("adapter"):
            job.run.download(key, Path(folder, key.removeprefix("adapter/")))
        card = card.model_copy(update={"kind": kind_of(Path(folder))})
        return registry.publish(name, version, Path(folder), card)


def count_learned(dataset: Dataset, validation: float) -> int:
    """Images of the subject that are learned from."""
    trained, _ = dataset.split(validation)
    return len({entry.record.uri for entry in trained.entries if not entry.record.is_class_image})


def report(run: Store) -> None:
    """Write the page about a run into its folder; what goes wrong there is a warning."""
    try:
        write_page([run], run)
    except Exception as error:  # the adapter is published, and `gtl report` makes the page again
        warnings.warn(f"{run.url()}: no report of the run: {error}", stacklevel=2)
