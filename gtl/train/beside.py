"""Scores the weights of a run's looks while it goes on, on GPUs or CPUs of the cluster that training leaves free.

Not Ray Train's own asynchronous validation: that is tied to Ray's checkpoints, which a run has none of, ends with the
run's controller, and tells nobody of a score before the run is over, when it is too late to stop early.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING

from gtl.adapters import Registry
from gtl.adapters.registry import EVALUATIONS
from gtl.config import Recipe
from gtl.config.metrics import of_pictures
from gtl.data.reference import Reference, reference
from gtl.evaluate.measure import check_images
from gtl.evaluate.result import Evaluation, Score
from gtl.evaluate.run import evaluate_all
from gtl.generate.spread import Published
from gtl.report.chart import short
from gtl.report.evaluations import interval
from gtl.session import Cluster
from gtl.storage import Store
from gtl.train.best import Best, best_of
from gtl.train.board import Row, Wish
from gtl.train.curves import Curves
from gtl.train.job import RESULT, Job
from gtl.train.resources import Resources
from gtl.train.scores import read_scores, scored, write_scores
from gtl.train.weights import CANDIDATES, forget, kept, take
from gtl.types import Progress, UserError, quiet

if TYPE_CHECKING:
    from gtl.families.base import Family

LOOK_S = 2.0
"""Between two looks for new weights."""


class Beside:
    """A thread that scores one look after the other, in order; what it did stands when it is cut off."""

    def __init__(self, recipe: Recipe, job: Job, family: Family, images: Reference) -> None:
        """Nothing happens before it is entered.

        Args:
            recipe: Of the run.
            job: Of the run.
            family: Its opened model.
            images: That pictures are compared with.
        """
        self._asked = recipe.model_copy(update={"evaluate": recipe.at_looks})
        self._recipe, self._job, self._family, self._images = recipe, job, family, images
        self._failed: dict[int, str] = {}
        self._known: dict[int, float] = {}
        """What the run is judged by, of the looks that were scored."""
        self._rows: deque[Row] = deque()
        self._curves = Curves(job.run)
        self._ended, self._cut = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._ask: Callable[[Wish], object] = lambda wish: None
        self._give_up: Callable[[str], object] = lambda mistake: None

    def attach(self, ask: Callable[[Wish], object], give_up: Callable[[str], object], let: object) -> None:
        """To ask the workers to end when more looks would not be better, or when nothing can be scored."""
        self._ask, self._give_up = ask, give_up

    def __enter__(self) -> Beside:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends, without the look at hand."""
        self._cut.set()
        self._ended.set()
        self._thread.join()
        with suppress(OSError):  # of a full disk, which was said when the look was made
            self._curves.close()

    def follow(self, rows: Sequence[Row]) -> list[Row]:
        """What was measured since the last call: rows with their step, and with `said` for people."""
        return [self._rows.popleft() for _ in range(len(self._rows))]

    def finish(self, progress: Progress) -> list[Row]:
        """Score what is left, now that training is over; the rows since the last call."""
        self._ended.set()
        if self._thread.is_alive():
            progress("score", 0, 0, "the look at hand")
            self._thread.join()
        left = self._missing()
        for number, step in enumerate(left):
            if (best := self._judge()) is not None and best.enough:
                break
            progress("score", number, len(left), f"step {step}")
            self._score(step, quiet)
            progress("score", number + 1, len(left), str(self._rows[-1]["said"]))
        return self.follow(())

    def best(self) -> Best | None:
        """What is best of all, if the run is judged by what is scored here.

        Raises:
            UserError: nothing could be scored.
        """
        best = self._judge()
        if best is not None and not best.step:
            reasons = "; ".join(dict.fromkeys(self._failed.values())) or "there was none after the first step"
            raise UserError(f"{best.metric}: no look at {self._job.run.url()} has it: {reasons}")
        return best

    def _missing(self) -> list[int]:
        done = {*scored(self._job.run), *self._failed}
        return [step for step in kept(self._job.run, CANDIDATES) if step not in done]

    def _work(self) -> None:
        while not self._ended.wait(LOOK_S):
            for step in self._missing()[:1]:
                self._score(step, self._watched)
                best = self._judge()
                if best is not None and best.enough:
                    self._ask("enough")

    def _watched(self, phase: str, done: int, total: int, detail: str = "") -> None:
        if self._cut.is_set():
            raise InterruptedError("the run is over")

    def _score(self, step: int, progress: Progress) -> None:
        """Score a look. A run does not end because that fails later on: the look has no score then."""
        run, name = self._job.run, f"{self._job.name}@{step:08d}"
        shelf = Registry(run.url(CANDIDATES))
        try:
            adapter = Published(shelf.store.root, name, sampler=self._asked.sampler)
            (found,) = evaluate_all(
                self._asked, shelf, [(adapter,)], self._family, self._images, self._job.dtype, progress
            )
            pairs = f"{self._job.name}/{step:08d}/{EVALUATIONS}/{found.key}.png"
            nearest = shelf.store.read(pairs) if found.nearest else None
            title = f"{self._job.name}@{self._job.version}"
            write_scores(run, found.model_copy(update={"adapter": title, "step": step}), nearest)
        except InterruptedError:
            return
        except Exception as error:
            self._failed[step] = " ".join(str(error).split())[:300]
            self._rows.append({"step": step, "said": f"step {step}: not scored: {self._failed[step]}"})
            if isinstance(error, UserError) and not scored(run):
                self._give_up(str(error))
            return
        self._draw(step)
        values = {metric: score.value for metric, score in found.scores.items()}
        self._rows.append({"step": step, **values, "said": say(step, found)})
        best = self._judge()
        forget(run, CANDIDATES, lambda other: other > step or (best is not None and other == best.step))

    def _draw(self, step: int) -> None:
        """Show a look in TensorBoard, without which a run goes on."""
        try:
            self._curves.add(step)
        except (OSError, UserError) as error:
            self._rows.append({"step": step, "said": f"step {step}: not in TensorBoard: {error}"})

    def _judge(self) -> Best | None:
        """The best of all looks that were scored so far; None if the run is not judged by that."""
        best = best_of(self._recipe)
        if best is None or not of_pictures([best.metric]):
            return None
        for step in scored(self._job.run):
            if step not in self._known:
                self._known[step] = read_scores(self._job.run, step)[best.metric]
            best.take(step, self._known[step])
        return best


def say(step: int, evaluation: Evaluation) -> str:
    """The scores of a look, for people."""
    return f"step {step}  " + "  ".join(say_score(name, score) for name, score in evaluation.scores.items())


def say_score(name: str, score: Score) -> str:
    """A score with its interval, for people."""
    bounds = "" if score.low is None else f" ({interval(score.low, score.high)})"
    return f"{name} {short(score.value)}{bounds}"


def is_beside(run: Store, recipe: Recipe, resources: Resources, cluster: Cluster, progress: Progress) -> bool:
    """Whether looks are scored while training goes on, which a run does to its end as it began; says if not."""
    if not recipe.at_looks.metrics:
        return False
    if scored(run):
        return bool(kept(run, CANDIDATES))
    most = resources.workers[1] if isinstance(resources.workers, tuple) else resources.workers
    kind, there, each = (
        ("GPU", cluster.gpus, float(resources.gpus_per_worker)) if cluster.gpus
        else ("CPU", cluster.cpus, resources.cpus_per_worker)
    )  # fmt: skip
    if there - most * each >= 1:
        return True
    names = ", ".join(recipe.at_looks.metrics)
    progress("score", 0, 0, f"{names}: in turn with training, which leaves no {kind} free; train.workers says how many")
    return False


def real_images(recipe: Recipe, family: Family, progress: Progress) -> Reference | None:
    """What looks compare pictures with; None where they do not.

    Raises:
        UserError: there are too few for a metric.
    """
    if not recipe.at_looks.metrics:
        return None
    images = reference(recipe.data, family, recipe.storage.cache, progress)
    check_images(recipe.at_looks, images)
    return images


def choose_best(job: Job, best: Best | None) -> None:
    """Let the run publish the best weights, where they were judged beside training."""
    if best is None:
        return
    take(job.run, CANDIDATES, best.step)
    result = json.loads(job.run.read(RESULT))
    job.run.write(RESULT, json.dumps({**result, **best.verdict}).encode())
