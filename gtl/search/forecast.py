"""What a study would try and what that takes, from a few measured steps of one trial."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from gtl.config import Study
from gtl.config.space import label
from gtl.config.trials import longest, unpacked
from gtl.report.chart import short
from gtl.report.facts import duration
from gtl.report.text import columns
from gtl.search.record import trial_name
from gtl.search.room import Room, fill, make_room
from gtl.search.space import configurations
from gtl.search.trial import Place
from gtl.session import Cluster, session
from gtl.train.board import Row
from gtl.train.launch import begin, open_model, run_workers
from gtl.types import Progress, quiet

STEPS, EVERY = 8, 4
"""Of the run that is measured, and between its looks."""
SHOWN = 50
"""Trials that are listed."""


@dataclass
class Clock:
    """Goes along with a run and looks at the time when its rows come."""

    step_seconds: list[float] = field(default_factory=list)
    arrivals: dict[int, float] = field(default_factory=dict)

    def attach(self, ask: object, give_up: object, let: object) -> None:
        """Asks for nothing."""

    def follow(self, rows: Sequence[Row]) -> list[Row]:
        """Take the time."""
        for row in rows:
            self.arrivals[int(row["step"])] = time.monotonic()
            if row["step"] > 1:  # the first has more to set up
                self.step_seconds.append(row["step_seconds"])
        return []

    def finish(self, progress: Progress) -> list[Row]:
        """Nothing is left."""
        return []

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return median(self.step_seconds)

    @property
    def look(self) -> float:
        """Seconds of a look: those between the rows of a step with one and of the step behind it, less the step."""
        return max(0.0, self.arrivals[EVERY] - self.arrivals[EVERY - 1] - self.step)


def forecast(study: Study, *, progress: Progress = quiet) -> str:
    """The space, the trials, what each needs, and the hours of all, for people.

    Raises:
        UserError: the study, the model, the data or the cluster is not what it has to be.
    """
    with session() as cluster, tempfile.TemporaryDirectory() as folder:
        place = Place(study.model_dump(mode="json"), folder, "measured")
        room = make_room(study, place, cluster)
        fill(study, place, room, progress)
        clock = measure(study, place, cluster, progress)
    return "\n\n".join([space_table(study), trials_table(study), need(study, room, clock)])


def measure(study: Study, place: Place, cluster: Cluster, progress: Progress) -> Clock:
    """Run a few steps of a trial, with a look."""
    recipe = place.recipe(study, {})
    train = recipe.train.model_copy(update={"steps": STEPS, "epochs": None})
    evaluate = recipe.evaluate.model_copy(update={"every": EVERY})
    recipe = recipe.model_copy(update={"train": train, "evaluate": evaluate})
    clock = Clock()
    progress("measure", 0, 0, f"{STEPS} steps of a trial")
    run_workers(begin(recipe, "steps", place.version, open_model(recipe, quiet), cluster, quiet), quiet, clock)
    return clock


def space_table(study: Study) -> str:
    """A row a key."""
    rows = [["key", "drawn from", "when"]]
    for key, domain in study.space.items():
        values = domain.values if domain.bounds is None else domain.bounds
        when = ", ".join(f"{parent}: {label(value)}" for parent, value in domain.when.items())
        rows.append([key, f"{domain.kind}: {', '.join(label(value) for value in values)}", when])
    return columns(rows)


def trials_table(study: Study) -> str:
    """A row a trial, where they are known beforehand."""
    then = ""
    if study.transfer_rank:
        _, *others = sorted(study.space["tuner.rank"].values)
        then = f"\nthen the best of them once more at each other rank: {', '.join(map(str, others))}"
    if study.searcher.type not in ("random", "grid"):
        searched = study.at_smallest_rank.num_trials
        return f"{searched} trials, which {study.searcher.type} chooses as it goes on{then}"
    found = configurations(study)
    rows = [["trial", *study.space]]
    rows += [
        [trial_name(number), *(label(values[key]) if key in values else "" for key in study.space)]
        for number, values in enumerate(found[:SHOWN])
    ]
    more = f"\nand {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return columns(rows) + more + then


def need(study: Study, room: Room, clock: Clock) -> str:
    """What a trial and the study take."""
    steps = longest(study)
    of_each = f"{room.devices} workers with {room.resources.cpus_per_worker:g} CPUs" + (
        f" and {room.resources.gpus_per_worker} GPUs" if room.resources.gpus_per_worker else ""
    )
    lines = [
        f"a trial: {of_each}, {room.concurrency} at once here",
        f"measured: {short(clock.step)} s a step of {study.base.train.batch_size} images, {short(clock.look)} s a look",
    ]
    if steps is None:
        return "\n".join([*lines, "how long it takes depends on what an epoch has; give train.steps to know it"])
    looks = math.ceil(steps / study.base.evaluate.every) + 1
    seconds = steps * clock.step + looks * clock.look
    share = expected_share(study, steps)
    searched = study.at_smallest_rank.num_trials
    total = (searched * share + study.num_trials - searched) * seconds
    lines += [
        f"a whole trial: {duration(seconds)}, start not included",
        f"the study: {short(total * room.devices / 3600)} {'GPU' if room.resources.gpus_per_worker else 'worker'}-hours"
        f", {duration(total / room.concurrency)} on this cluster",
    ]  # fmt: skip
    if share < 1:
        lines.append(f"{study.scheduler.type} stops trials early: that is {share:.0%} of their steps, more if they tie")
    return "\n".join([*lines, pack_line(study)])


def pack_line(study: Study) -> str:
    """Whether trials share forward passes."""
    if study.pack == "off" or (reason := unpacked(study)) is not None:
        return f"each trial trains alone: {'pack is off' if study.pack == 'off' else reason}"
    when = f"{study.pack} in a forward pass" if study.pack != "auto" else (
        "several in a forward pass where that pays, which is measured when the study begins"
    )  # fmt: skip
    return f"trials train {when}; the times above are of trials alone"


def expected_share(study: Study, steps: int) -> float:
    """The share of all steps that ASHA runs if one in `reduction_factor` passes each rung; 1 with other schedulers."""
    from gtl.search.schedule import make_scheduler

    if study.scheduler.type != "asha":
        return 1.0
    rungs = sorted(milestone for milestone, _ in make_scheduler(study)._brackets[0]._rungs)  # type: ignore[attr-defined]
    share, passing, before = 0.0, 1.0, 0
    for rung in rungs:
        share += passing * (rung - before) / steps
        passing, before = passing / study.scheduler.reduction_factor, rung
    return share + passing * (steps - before) / steps
