"""What a study would try and what that takes, from a few steps of one trial, measured here or predicted."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Sequence
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
from gtl.search.schedule import check_searcher
from gtl.search.simulate import Tempo, draws, middle
from gtl.search.space import configurations
from gtl.search.trial import Place
from gtl.session import Cluster, session
from gtl.train.board import Row
from gtl.train.forecast import forecast as plan
from gtl.train.forecast import parse_cluster, plural
from gtl.train.launch import begin, open_model, run_workers
from gtl.types import Progress, UserError, quiet

STEPS, EVERY = 8, 4
"""Of the run that is measured, and between its looks."""
SHOWN = 50
"""Trials that are listed."""
START = 60.0
"""Seconds before a trial's first step, where nothing was measured: processes that start and weights that are read."""


@dataclass
class Clock:
    """Goes along with a run and looks at the time when its rows come."""

    begun: float = field(default_factory=time.monotonic)
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

    @property
    def start(self) -> float:
        """Seconds before the first step, the look before it included."""
        return max(0.0, self.arrivals[1] - self.begun - self.step)

    @property
    def tempo(self) -> Tempo:
        """All of them."""
        return Tempo(self.step, self.look, self.start)


def forecast(study: Study, cluster: str | None = None, *, progress: Progress = quiet) -> str:
    """The space, the trials, what each needs, and the hours of all, for people.

    Args:
        study: See `gtl.load_study`.
        cluster: NODESxGPUSxKIND, of which nothing has to be there: steps are then predicted (`gtl.train.pace`). None: a
            few steps are measured on the cluster that is.
        progress: Is called as it goes on.

    Raises:
        UserError: the study, the model, the data or the cluster is not what it has to be.
    """
    check_searcher(study)
    if cluster is not None:
        return "\n\n".join([space_table(study), trials_table(study), *planned(study, cluster, progress)])
    with session() as here, tempfile.TemporaryDirectory() as folder:
        place = Place(study.model_dump(mode="json"), folder, "measured")
        room = make_room(study, place, here)
        fill(study, place, room, progress)
        clock = measure(study, place, here, progress)
    said = (
        f"measured: {short(clock.step)} s a step of {study.base.train.batch_size} images, {short(clock.look)} s a look"
    )
    return "\n\n".join([space_table(study), trials_table(study), need(study, room, clock.tempo, said)])


def planned(study: Study, cluster: str, progress: Progress) -> Iterator[str]:
    """What the trials take of a cluster that one may not have.

    Raises:
        UserError: it is not spelled so, nothing is known of its GPUs, or a trial does not fit.
    """
    hardware = parse_cluster(cluster)
    place = Place(study.model_dump(mode="json"), "planned", "planned")
    recipe = place.recipe(study, {})
    if recipe.train.gpus_per_worker == 0:
        raise UserError("train.gpus_per_worker: 0: trains on CPUs, of which --cluster says nothing; leave it out")
    room = make_room(study, place, Cluster(math.inf, hardware.workers, hardware.devices))
    train = recipe.train.model_copy(update={"workers": room.devices})
    found = plan(recipe.model_copy(update={"train": train}), cluster, progress)
    if found.outlook is None or found.plan is None:
        raise UserError(found.problem or f"--cluster {cluster}: {found.untimed}")
    one = next(line.pace for line in found.outlook.lines if line.chosen)
    said = (
        f"predicted: {short(float(f'{one.step:.3g}'))} s a step of {one.batch_size} images, {one.communication:.1%} of "
        f"it communication, ZeRO stage {one.stage} (gtl plan --cluster {cluster}); assumed: {START:g} s to start a "
        "trial, looks (evaluate.every) take no time"
    )
    yield need(study, room, Tempo(one.step, 0.0, START), said)
    if study.base.train.workers == "auto" and hardware.workers > 1:
        yield (
            f"train.workers: auto gives a trial all {hardware.workers} GPUs; --set set.train.workers=1 runs "
            f"{hardware.workers} trials at once"
        )


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


def need(study: Study, room: Room, tempo: Tempo, said: str) -> str:
    """What a trial and the study take; `said` is where its times are from."""
    steps, on_gpus = longest(study), bool(room.resources.gpus_per_worker)
    of_each = f"{plural(room.devices, 'worker')} with {room.resources.cpus_per_worker:g} CPUs" + (
        f" and {room.resources.gpus_per_worker} GPUs" if on_gpus else ""
    )
    lines = [f"a trial: {of_each}, {room.concurrency} at once", said]
    if steps is None:
        return "\n".join([*lines, "how long it takes depends on what an epoch has; give train.steps to know it"])
    looks = math.ceil(steps / study.base.evaluate.every)
    found = draws(study, tempo, room.concurrency)
    usual = middle(found)
    hours, device_hours = usual.seconds / 3600, usual.busy * room.devices / 3600
    bounds = f" ({duration(found[0].seconds)} to {duration(found[-1].seconds)})" if len(found) > 1 else ""
    lines += [
        f"a whole trial: {duration(tempo.start + steps * tempo.step + looks * tempo.look)}, {duration(tempo.start)} of "
        "them to start",
        f"the study: {short(float(f'{device_hours:.3g}'))} {'GPU' if on_gpus else 'worker'}-hours, "
        f"{duration(usual.seconds)}{bounds}",
    ]  # fmt: skip
    if usual.share < 1:
        lines.append(
            f"{study.scheduler.type} stops trials early: that is {usual.share:.0%} of their steps, simulated for "
            f"trials that keep their place among each other, in {plural(len(found), 'random order')}"
        )
    elif study.scheduler.type not in ("asha", "fifo"):
        lines.append(f"{study.scheduler.type}: all trials are counted whole; what it pauses or stops is not simulated")
    for name, most, asked in (
        ("hours", study.budget.hours, hours),
        ("gpu_hours", study.budget.gpu_hours, device_hours),
    ):
        if most is not None and most < asked:
            lines.append(f"budget.{name}: {most:g}: ends it before that")
    return "\n".join([*lines, pack_line(study)])


def pack_line(study: Study) -> str:
    """Whether trials share forward passes."""
    if study.pack == "off" or (reason := unpacked(study)) is not None:
        return f"each trial trains alone: {'pack is off' if study.pack == 'off' else reason}"
    when = f"{study.pack} in a forward pass" if study.pack != "auto" else (
        "several in a forward pass where that pays, which is measured when the study begins"
    )  # fmt: skip
    return f"trials train {when}; the times above are of trials alone"
