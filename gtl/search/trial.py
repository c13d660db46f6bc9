"""One configuration of a study: a whole run on Ray Train, as Ray Tune sees it."""

from __future__ import annotations

import json
import math
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.tune import Trainable

from gtl.config import Recipe, Study
from gtl.config.judged import COSTS
from gtl.config.load import parse_recipe, parse_study
from gtl.search.pack import Packs
from gtl.search.record import trial_name
from gtl.search.schedule import STEP
from gtl.search.space import TRIAL
from gtl.session import session
from gtl.storage import Store
from gtl.train.board import Row, Wish
from gtl.train.checkpoint import complete, step_key
from gtl.train.job import CHECKPOINTS, RESULT
from gtl.train.launch import Start, begin, open_model, run_workers
from gtl.train.track import read_rows
from gtl.types import Progress, quiet

POINTER = "pointer.json"
"""In a checkpoint of Ray Tune's: which run's state is meant. The state itself stays in the run's folder."""
INFERENCE = "inference.json"
"""In a run's folder: what drawing a picture with what it published takes, in a study that weighs that."""
FAILED = "failed"
"""In a run's folder: why the trial came to nothing, in one line."""
CLEANUP_S = 120.0
"""That a trial may take to save and stop."""
WAIT_S = 0.2
"""Between two looks whether it has, or whether a state is there."""
PAUSING = ("pbt", "hyperband", "bohb")
"""Schedulers that pause trials at a look and let them go on from it: their trials wait there to be told."""


class TrialFailed(Exception):  # noqa: N818 - it is what happened
    """A trial came to nothing; the study goes on."""


@dataclass(frozen=True)
class Place:
    """Where a study's trials are."""

    study: dict[str, Any]
    """The study's values."""
    url: str
    """Of the study's folder."""
    version: str

    def recipe(self, study: Study, values: Mapping[str, Any]) -> Recipe:
        """The recipe of a trial: measured by the study's metrics at every look, published where it was best.

        Raises:
            UserError: the recipe refuses a value.
        """
        changed = study.recipe_of(values).model_dump(mode="json")
        beside, train = changed["evaluate"]["beside"], changed["train"]
        beside["metrics"] = [*dict.fromkeys([*study.measured, *beside["metrics"]])]
        if train["early_stopping"] is None and len(study.metrics) == 1:
            train["checkpoints"]["best"] = train["checkpoints"]["best"] or study.metrics[0]
        if study.scheduler.type in PAUSING:  # which go on from looks
            train["checkpoints"]["every"] = changed["evaluate"]["every"]
        changed["storage"]["runs"] = f"{self.url}/trials"
        return parse_recipe(changed)

    def run(self, number: int) -> Store:
        """The folder of a trial's run."""
        return Store(f"{self.url}/trials/{trial_name(number)}/{self.version}")


class Relay:
    """Goes along with a trial's workers and hands on what they measured."""

    def __init__(self, metrics: Sequence[str], board: Any) -> None:
        """Hand on rows with all of these metrics; `board` is the study's, where it is asked to stop."""
        self._metrics, self._board = metrics, board
        self.rows: queue.Queue[Row | None] = queue.Queue()
        """The rows, and None at the end."""
        self.ask: Callable[[Wish], object] = lambda wish: None
        self.let: Callable[[float], object] = lambda step: None
        self._told = 0.0

    def attach(
        self, ask: Callable[[Wish], object], give_up: Callable[[str], object], let: Callable[[float], object]
    ) -> None:
        """To stop the workers, and to let them go on from a look."""
        self.ask, self.let = ask, let

    def follow(self, rows: Sequence[Row]) -> list[Row]:
        """Hand on looks after the first step, each once, also where the workers had to start again; adds none."""
        if ray.get(self._board.wish.remote()) is not None:
            self.ask("stop")
        for row in rows:
            if row[STEP] > self._told and all(name in row for name in self._metrics):
                self._told = row[STEP]
                self.rows.put(row)
        return []

    def finish(self, progress: Progress) -> list[Row]:
        """Adds none."""
        return []


class Trial(Trainable):
    """Lives as an actor with a sliver of a CPU; the run's workers have places of their own, or it trains in a pack.

    `step` lasts until the run has looked at what it learned. The run does not wait for an answer, so that a trial that
    is stopped may have made a few steps more; but one that may be paused goes on only with the next `step`.
    """

    def setup(
        self, config: dict[str, Any], place: Place | None = None, board: Any = None, packs: Packs | None = None
    ) -> None:
        """Nothing is started before the first step, since a state of another run may be put in place first."""
        assert place is not None
        self._place = place
        self._study = parse_study(place.study)
        self._number = int(config[TRIAL])
        self._run = place.run(self._number)
        self._board, self._packs = board, packs
        self._relay = Relay(self._study.measured, board)
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._is_inside = False
        self._step = 0

    def step(self) -> dict[str, Any]:
        """What the next look measured; after the last one also what the trial cost."""
        if self._thread is None:
            self._enter()
            if self._run.exists(FAILED):  # Ray Tune tries all that failed again; this would come to the same
                raise TrialFailed(self._run.read(FAILED).decode())
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()
        self._relay.let(self._step)
        row = self._relay.rows.get()
        if row is not None and row[STEP] < row["steps"]:
            self._step = int(row[STEP])
            return self._result(row)
        self._thread.join()
        if self._failure is not None and ray.get(self._board.wish.remote()) is not None:
            return {STEP: 0, **dict.fromkeys(self._study.metrics, math.nan)}  # the study is over; nobody looks at it
        if self._failure is not None:
            reason = " ".join(str(self._failure.__cause__ or self._failure).split())[:500]
            self._run.write(FAILED, reason.encode())
            raise TrialFailed(reason)
        looks = [row for row in read_rows(self._run) if all(name in row for name in self._study.measured)]
        if not looks:
            reason = f"its run ended and no look at it has measured {', '.join(self._study.measured)}"
            self._run.write(FAILED, reason.encode())
            raise TrialFailed(reason)
        return {**self._result(looks[-1]), "done": True}

    def cleanup(self) -> None:
        """Let the workers save and leave."""
        if self._thread is not None:
            self._relay.ask("stop")
            self._thread.join(CLEANUP_S)
        if self._is_inside:
            ray.get(self._board.leave.remote(self._number))

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Where the state is."""
        pointer = {"run": self._run.url(), "number": self._number, "step": self._step}
        Path(checkpoint_dir, POINTER).write_text(json.dumps(pointer))

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Go on from the state of a run; another trial's takes the place of this one's."""
        pointer = json.loads(Path(checkpoint, POINTER).read_text())
        if pointer["number"] != self._number:
            self._enter()
            take_over(self._place.run(pointer["number"]), self._run, pointer["step"])

    def _enter(self) -> None:
        """Wait until whoever was this trial before has left its run's folder: Ray Tune does not."""
        end = time.monotonic() + CLEANUP_S
        while not self._is_inside and not ray.get(self._board.enter.remote(self._number)) and time.monotonic() < end:
            time.sleep(WAIT_S)
        self._is_inside = True

    def _result(self, row: Mapping[str, Any]) -> dict[str, Any]:
        values = {name: row[name] for name in self._study.measured}
        costs = {name: value for name, value in costs_of(self._run).items() if name in self._study.metrics}
        return {STEP: int(row[STEP]), **values, **costs}

    def _work(self) -> None:
        try:
            recipe = self._place.recipe(self._study, self.config)
            with session() as cluster:
                family = open_model(recipe, quiet)
                name, version = trial_name(self._number), self._place.version
                start = begin(recipe, name, version, family, cluster, quiet)
                waits = self._study.measured if self._study.scheduler.type in PAUSING else ()
                start = replace(start, job=replace(start.job, waits=waits))
                run_workers(start, quiet, self._relay, None if self._packs is None else self._packs.train)
                if "inference_tflops" in self._study.metrics:
                    weigh(start)
        except BaseException as error:  # handed to `step`, which is the actor's own thread
            self._failure = error
        finally:
            self._relay.rows.put(None)


def weigh(start: Start) -> None:
    """Count what a picture takes with what a finished run published, unless that is done."""
    from gtl.search.cost import inference_tflops

    run = start.job.run
    if run.exists(INFERENCE):
        return
    with tempfile.TemporaryDirectory() as folder:
        for key, _, _ in run.list("adapter"):
            run.download(key, Path(folder, key.removeprefix("adapter/")))
        found = inference_tflops(start.recipe, Path(folder))
    run.write(INFERENCE, json.dumps({"inference_tflops": found}).encode())


def costs_of(run: Store) -> dict[str, float]:
    """What a finished trial cost, by the names that a study may weigh; infinite before that."""
    costs = dict.fromkeys(COSTS, math.inf)
    if run.exists(RESULT):
        costs["adapter_bytes"] = sum(size for key, size, _ in run.list("adapter") if key.endswith(".safetensors"))
        costs["device_hours"] = json.loads(run.read(RESULT))["device_hours"]
    if run.exists(INFERENCE):
        costs |= json.loads(run.read(INFERENCE))
    return {name: float(cost) for name, cost in costs.items()}


def take_over(source: Store, target: Store, step: int) -> None:
    """Put the state that another trial's run had after a step in the place of a run's own; its newest if that is gone.

    Waits for it, since it may just be written.
    """
    wanted, end = step_key(CHECKPOINTS, step), time.monotonic() + CLEANUP_S
    while (not (found := complete(source, CHECKPOINTS)) or found[-1] < wanted) and time.monotonic() < end:
        time.sleep(WAIT_S)
    if not found:
        return
    key = wanted if wanted in found else found[-1]
    target.delete_folder(CHECKPOINTS)
    manifest = [name for name, _, _ in source.list(key) if name.endswith("manifest.json")]
    files = [name for name, _, _ in source.list(key) if name not in manifest]
    for name in [*files, *manifest]:
        target.write(name, source.read(name))
