"""Population based training whose trials wait for each other at an exchange, while their runs stand still."""

from __future__ import annotations

import time
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import PopulationBasedTraining

from gtl.search.schedule import STEP
from gtl.search.space import TRIAL

WAIT_S = 600.0
"""That trials wait for the others at most: one may have lost its machine. A run's other workers bear 1800."""


class Population(PopulationBasedTraining):
    """Leaves a trial alone once it is at its end, and lets all exchange at once (Jaderberg et al. 2017, appendix A.1).

    Ray's own `synch` ends the process of every trial at every exchange, to make room for others, and starts it anew.
    Where all have a place they keep it here: a trial that comes to an exchange is not asked for its next step until the
    others are there. Where they have not, Ray's own way without waiting makes them take turns.
    """

    def __init__(self, *, steps: int, together: bool, **options: Any) -> None:
        """A population.

        Args:
            steps: Optimizer steps of a trial.
            together: Whether all trials have a place at once.
            options: Of Ray's `PopulationBasedTraining`.
        """
        super().__init__(STEP, **options)
        self._steps, self._together = steps, together
        self._waiting: dict[Trial, float] = {}
        """Those that are at the exchange, and when they came."""

    def _get_new_config(self, trial: Trial, trial_to_clone: Trial) -> tuple[dict[str, Any], dict[str, Any]]:
        config, operations = super()._get_new_config(trial, trial_to_clone)
        return {**config, TRIAL: trial.config[TRIAL]}, operations  # who takes over stays who it is

    def on_trial_result(self, controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Whether a trial goes on from a look, or waits."""
        if result[STEP] >= self._steps:
            self._trial_state[trial].last_train_time = result[STEP]
            self._trial_state[trial].last_score = None  # nothing is to be taken from who leaves
            return str(self.CONTINUE)
        if not self._together:
            return str(super().on_trial_result(controller, trial, result))
        self._save_trial_state(self._trial_state[trial], result[STEP], result, trial)
        if result[STEP] < self._next_perturbation_sync:
            return str(self.CONTINUE)
        self._waiting[trial] = time.monotonic()
        if self._is_missing(controller):
            return str(self.NOOP)
        self._exchange(controller, arriving=trial)
        return str(self.NOOP if trial.status == Trial.PAUSED else self.CONTINUE)

    def on_trial_error(self, controller: Any, trial: Trial) -> None:
        """Nobody waits for who failed; if it is tried again, it goes on by itself until the next exchange."""
        self._waiting.pop(trial, None)
        super().on_trial_error(controller, trial)
        self._go_on_without(controller, trial)

    def on_trial_complete(self, controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """Nobody waits for who is through."""
        self._waiting.pop(trial, None)
        super().on_trial_complete(controller, trial, result)
        self._go_on_without(controller, trial)

    def choose_trial_to_run(self, controller: Any) -> Trial | None:
        """Is asked all the time, also while all wait."""
        if self._waiting and time.monotonic() - max(self._waiting.values()) > WAIT_S:
            self._exchange(controller)
        return super().choose_trial_to_run(controller)

    def _go_on_without(self, controller: Any, trial: Trial) -> None:
        if self._waiting and not self._is_missing(controller, trial):
            self._exchange(controller)

    def _is_missing(self, controller: Any, gone: Trial | None = None) -> bool:
        """Whether anybody is still on the way."""
        there = {*self._waiting, gone}
        return any(
            self._trial_state[trial].last_train_time < self._next_perturbation_sync
            for trial in controller.get_live_trials() if trial not in there
        )  # fmt: skip

    def _exchange(self, controller: Any, arriving: Trial | None = None) -> None:
        """Let the poor ones of those that are there take over from the good ones, and all go on.

        Args:
            controller: Ray Tune's.
            arriving: Whose result is at hand, which Ray Tune itself lets go on.
        """
        there, self._waiting = list(self._waiting), {}
        times = [self._trial_state[trial].last_train_time for trial in there]
        self._next_perturbation_sync = max(self._next_perturbation_sync + self._perturbation_interval, *times)
        for trial, state in self._trial_state.items():
            if trial not in there:
                state.last_score = None
        poor, good = self._quantiles()
        for trial in [*good, *poor]:  # in this order: the state of the good ones is to be had then
            self._checkpoint_or_exploit(trial, controller, good, poor)
        for trial in there:
            if trial.status == Trial.PAUSED:  # that it was saving then is not to stop it later
                controller._cached_trial_decisions.pop(trial.trial_id, None)
            elif trial is not arriving:
                controller._schedule_trial_train(trial)
