"""Trials on Ray Tune: what is told of them while they run, and when all of them have to end."""

from __future__ import annotations

import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from ray import tune
from ray.tune import Callback, CheckpointConfig, FailureConfig, RunConfig, Stopper
from ray.tune.search import Searcher

from gtl.config import Study
from gtl.report.chart import short
from gtl.search.desk import Desk
from gtl.search.pack import Packs
from gtl.search.record import ENDED, Record, TrialRecord, trial_name
from gtl.search.room import Room
from gtl.search.schedule import make_scheduler, make_searcher, remember
from gtl.search.space import TRIAL, param_space
from gtl.search.standing import Audience, Spent, standing
from gtl.search.trial import FAILED, Place, Trial, costs_of
from gtl.storage import Store
from gtl.train.board import make_board
from gtl.train.job import RESULT
from gtl.train.launch import stop_signals
from gtl.train.track import write_hparams

STATE = "searcher.pkl"
"""In a study's folder: what a searcher has learned."""
REFRESH_S = 3.0
"""Between two looks at the records of trials that run, for who watches them."""
DEATHS = 1
"""Times that a trial goes on from its run's newest checkpoint after the process that drives it died, with its machine
or without; its workers have train.max_failures of their own."""
SLIVER: dict[str, float] = {"cpu": 0, "memory": 1}
"""For what drives a trial, whose workers have places of their own: it has to be something, and nothing that they need,
or on a machine with one CPU they would wait for ever."""


def run_trials(
    study: Study, place: Place, record: Record, room: Room, packs: Packs | None, left: Sequence[int],
    audience: Audience, steps: int,
) -> None:  # fmt: skip
    """Run what is left of a study.

    Args:
        study: The study.
        place: Where its trials are.
        record: What is known of them; kept up to date.
        room: What the cluster has for them.
        packs: Where they train together, if they do.
        left: Numbers of trials that were begun or are listed, and have not ended.
        audience: Is told as it goes on.
        steps: Optimizer steps of the longest trial.

    Raises:
        UserError: there is nothing between a trial's first look and its last.
        KeyboardInterrupt: the study was stopped; its trials have saved.
    """
    board = make_board(Desk)
    concurrency, devices = (room.concurrency, room.devices) if packs is None else (packs.concurrency, 1 / packs.places)
    if study.concurrency != "auto":
        concurrency = min(concurrency, study.concurrency)
    with stop_signals(lambda: board.ask.remote("stop")) as seen:
        teller = Teller(study, place, record, devices, audience, seen, board)
        scheduler = make_scheduler(study, steps, together=concurrency >= study.num_trials)
        remember(scheduler, study, list(record.trials.values()))
        inner = make_searcher(study)
        numbered = None
        begun = {number: record.trials[trial_name(number)].config for number in left}
        if inner is not None:
            numbered = Numbered(inner, begun, len(record.trials), place, seen)
        samples = study.num_trials - sum(one.state in ENDED for one in record.trials.values()) if numbered else 1
        if numbered and samples < 1:
            return
        # HyperBand makes its brackets of the trials that it knows, and Ray Tune tells it of no more than it may start.
        known_at_once = study.scheduler.type == "hyperband" and numbered is None
        with quiet_tune():
            driver = tune.with_parameters(Trial, place=place, board=board, packs=packs)
            tuner = tune.Tuner(
                tune.with_resources(driver, share_of_head(concurrency) if known_at_once else SLIVER),
                param_space={} if numbered else param_space(study, begun),
                tune_config=tune.TuneConfig(
                    search_alg=numbered, scheduler=scheduler, num_samples=samples, reuse_actors=False,
                    max_concurrent_trials=None if known_at_once else concurrency,
                    trial_name_creator=trial_id, trial_dirname_creator=trial_id,
                ),
                run_config=RunConfig(
                    name="tune", storage_path=Store(place.url).path(), storage_filesystem=Store(place.url).fs,
                    callbacks=[teller], stop=End(study, record, audience.hours, seen, board), verbose=0,
                    checkpoint_config=CheckpointConfig(checkpoint_frequency=1),  # pointers, of some bytes
                    failure_config=FailureConfig(max_failures=DEATHS),
                ),
            )  # fmt: skip
            tuner.fit()
        teller.close()
        Store(place.url).delete_folder("tune")
    if seen:
        raise KeyboardInterrupt(f"{place.url}: stopped; its trials have saved, --resume goes on")


def share_of_head(concurrency: int) -> dict[str, float]:
    """What a driver takes, so that there is room for so many: a share of a resource that every cluster has one of."""
    return {"cpu": 0, "node:__internal_head__": math.floor(9000 / concurrency) / 10000}


def trial_id(trial: Any) -> str:
    """What Ray Tune calls a trial's folder."""
    return str(trial.trial_id)


@contextmanager
def quiet_tune() -> Iterator[None]:
    """Within it Ray Tune writes no tables and no advice: the command's own progress tells."""
    before = {key: os.environ.get(key) for key in QUIET}
    level = logging.getLogger("ray.tune").level
    os.environ.update(QUIET)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # failed trials are told of by ours
    try:
        yield
    finally:
        logging.getLogger("ray.tune").setLevel(level)
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # after which it would look as if all were done
    "TUNE_WARN_THRESHOLD_S": "1000000",
}


class Teller(Callback):
    """Keeps the record and tells how far the study is."""

    def __init__(
        self, study: Study, place: Place, record: Record, devices: float, audience: Audience, seen: Sequence[int],
        board: Any,
    ) -> None:  # fmt: skip
        """Nothing has happened yet; `seen` are the signals that ask the study to stop, `board` is what trials ask."""
        self._study, self._place, self._record = study, place, record
        self._devices, self._audience, self._seen = devices, audience, seen
        self._board = board
        self._before = steps_made(record), record.device_hours
        self._began = self._shown = time.monotonic()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has begun, or goes on."""
        self._update(trial, "running")

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
        """A look at a trial."""
        self._update(trial, "running")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial is through, or was stopped."""
        ran = self._place.run(int(trial.config[TRIAL])).exists(RESULT)
        self._update(trial, "finished" if ran else "running" if self._seen else "stopped")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial's process died, and another will go on with it."""
        self._board.leave.remote(int(trial.config[TRIAL]))
        self._update(trial, "running")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial came to nothing."""
        self._board.leave.remote(int(trial.config[TRIAL]))
        self._update(trial, "failed")

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Some of a second has passed: who watches sees the steps that are made between two looks."""
        if self._audience.watch is None or time.monotonic() - self._shown < REFRESH_S:
            return
        for name, one in self._record.trials.items():
            if one.state == "running":
                self._read(int(name), one)
        self._show()

    def close(self) -> None:
        """All is over: those that still ran were stopped by the budget."""
        for one in self._record.trials.values():
            if one.state == "running" and not self._seen:
                one.state = "stopped"
        self._record.save(self._audience.hours())

    def _update(self, trial: Any, state: str) -> None:
        number = int(trial.config[TRIAL])
        run, name = self._place.run(number), trial_name(number)
        one = self._record.trials.setdefault(name, TrialRecord(name, {}, run.url()))
        one.config, one.state = self._study.configuration(trial.config), state
        self._read(number, one)
        if state == "failed":
            one.reason = run.read(FAILED).decode() if run.exists(FAILED) else death_of(trial)
        if state in ENDED and one.looks:
            write_hparams(run, one.config, self._study.measured)
        self._record.save(self._audience.hours())
        self._tell()
        self._show()

    def _read(self, number: int, one: TrialRecord) -> None:
        run = self._place.run(number)
        costs = {key: value for key, value in costs_of(run).items() if key in self._study.metrics}
        one.read(run, self._study.measured, costs, self._devices)

    def _show(self) -> None:
        if self._audience.watch is None:
            return
        self._shown, record, (steps, device_hours) = time.monotonic(), self._record, self._before
        spent = Spent(
            steps_made(record) - steps, record.device_hours - device_hours, self._shown - self._began,
            record.hours + self._audience.hours(),
        )  # fmt: skip
        self._audience.watch(standing(self._study, record, spent))

    def _tell(self) -> None:
        states = [one.state for one in self._record.trials.values()]
        done = sum(state in ENDED for state in states)
        parts = [f"{states.count('running')} running"]
        parts += [f"{states.count(state)} {state}" for state in ("stopped", "failed") if state in states]
        if (best := self._record.best()) is not None:
            name = self._study.metrics[0]
            shown = ", ".join(f"{key} {short(v) if isinstance(v, float) else v}" for key, v in best.config.items())
            parts.append(f"best {name} {short(best.metrics[name])} ({best.trial}: {shown})")
        self._audience.progress("trials", done, self._record.study.num_trials, "  ".join(parts))


def steps_made(record: Record) -> int:
    """Of all trials."""
    return sum(one.steps for one in record.trials.values())


def death_of(trial: Any) -> str:
    """Why a trial failed that could not say so itself, in one line."""
    file = Path(trial.error_file)  # the local one: Ray Tune's store has it later
    lines = [line.strip() for line in file.read_text().splitlines() if line.strip()] if file.exists() else []
    return f"its process died: {lines[-1][:300] if lines else 'nothing is known of why'}"


class End(Stopper):
    """Ends a study whose time is up, or that somebody stops."""

    def __init__(
        self, study: Study, record: Record, hours: Callable[[], float], seen: Sequence[int], board: Any
    ) -> None:
        """As the study's budget says, or as soon as a signal is among those seen; the trials read the board."""
        self._budget, self._record, self._hours, self._seen, self._board = study.budget, record, hours, seen, board

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No trial ends by itself."""
        return False

    def stop_all(self) -> bool:
        """Whether all do; then they save at once, not only at their next look."""
        on_the_clock, of_devices = self._budget.hours, self._budget.gpu_hours
        is_over = bool(self._seen)
        is_over |= on_the_clock is not None and self._record.hours + self._hours() >= on_the_clock
        is_over |= of_devices is not None and self._record.device_hours >= of_devices
        if is_over:
            self._board.ask.remote("stop")
        return is_over


class Numbered(Searcher):
    """A searcher whose trials have numbers, which goes on with those that were begun before the study was cut off."""

    def __init__(
        self, inner: Searcher, begun: dict[int, dict[str, Any]], known: int, place: Place, seen: Sequence[int]
    ) -> None:
        """Go on from what the searcher had learned.

        Args:
            inner: Suggests configurations.
            begun: Trials to go on with, by number.
            known: Trials that have a number.
            place: Of the study.
            seen: Signals that ask the study to stop; what trials come to after that is not learned from.
        """
        super().__init__(metric=inner.metric, mode=inner.mode)
        self._inner, self._begun, self._next = inner, list(begun.items()), known
        self._folder, self._seen = Store(place.url), seen
        self._names: dict[str, str] = {}
        """Ray Tune's id of a trial -> the one by which the inner searcher knows it."""
        self.restore_state()

    def suggest(self, trial_id: str) -> Any:
        """The next configuration, with its number."""
        if self._begun:
            number, values = self._begun.pop(0)
            self._names[trial_id] = trial_name(number)
            return {**values, TRIAL: number}
        number = self._next
        config: Any = self._inner.suggest(trial_name(number))
        if not isinstance(config, dict):
            return config
        self._next += 1
        self._names[trial_id] = trial_name(number)
        self.save_state()
        # ConfigSpace, of which BOHB's come, has numpy's numbers.
        plain = {key: value.item() if isinstance(value, np.generic) else value for key, value in config.items()}
        return {**plain, TRIAL: number}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Hand on."""
        if self._seen:
            return
        self._inner.on_trial_result(self._names[trial_id], result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Hand on."""
        if self._seen:
            return
        self._inner.on_trial_complete(self._names[trial_id], result, error)
        self.save_state()

    def on_pause(self, trial_id: str) -> None:
        """Hand on: the scheduler of BOHB tells its searcher who waits."""
        self._inner.on_pause(self._names[trial_id])  # type: ignore[attr-defined]

    def on_unpause(self, trial_id: str) -> None:
        """Hand on."""
        self._inner.on_unpause(self._names[trial_id])  # type: ignore[attr-defined]

    def save(self, checkpoint_path: str) -> None:
        """Ray Tune's own copy, which is not read."""

    def restore(self, checkpoint_path: str) -> None:
        """See `restore_state`."""

    def save_state(self) -> None:
        """Keep what the inner searcher has learned, where a study goes on from."""
        with tempfile.TemporaryDirectory() as temporary:
            file = Path(temporary, STATE)
            self._inner.save(str(file))
            self._folder.upload(file, STATE)

    def restore_state(self) -> None:
        """Take it up again, if there is any."""
        if self._folder.exists(STATE):
            with tempfile.TemporaryDirectory() as temporary:
                self._inner.restore(str(self._folder.download(STATE, Path(temporary, STATE))))
