"""Weights & Biases and MLflow, where they are installed and set up: the launcher sends them what the run reports."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from gtl.types import Progress

if TYPE_CHECKING:
    from gtl.train.board import Row
    from gtl.train.job import Job

NOT_METRICS = ("step", "steps")
VERSION_TAG = "gtl.version"


class Service(Protocol):
    """A run, as a tracking service keeps it."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add what was measured after a step."""

    def close(self, *, is_finished: bool) -> None:
        """Send what is left and end the run; one that is not finished can be gone on with."""


class Wandb:
    """A run of Weights & Biases; its id is the version, so that a resumed run goes on in the same curves."""

    def __init__(self, job: Job) -> None:
        """Start or go on, in project `gtl` unless WANDB_PROJECT says another."""
        import os

        import wandb

        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "gtl"), id=job.version, resume="allow",
            name=f"{job.name}@{job.version}", group=job.name, config=dict(job.recipe),
            settings=wandb.Settings(silent=True, console="off"),
        )  # fmt: skip
        # Its own count of steps never goes back: it drops what comes late, such as scores from beside training.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add what was measured after a step."""
        self._run.log({**metrics, "step": step})

    def close(self, *, is_finished: bool) -> None:
        """Send what is left."""
        self._run.finish(exit_code=0 if is_finished else 1)


class MLflow:
    """A run of MLflow, in an experiment of the run's name; found again by the version, its tag."""

    def __init__(self, job: Job) -> None:
        """Start or go on."""
        from mlflow import MlflowClient
        from mlflow.entities import Param

        # A client: the module's functions keep one active run a process, which may be the caller's own.
        self._client = MlflowClient()
        known = self._client.get_experiment_by_name(job.name)
        experiment = known.experiment_id if known else self._client.create_experiment(job.name)
        if begun := self._client.search_runs([experiment], f"tags.`{VERSION_TAG}` = '{job.version}'"):
            self._id = begun[0].info.run_id
            self._client.set_terminated(self._id, "RUNNING")
            return
        tags = {VERSION_TAG: job.version}
        self._id = self._client.create_run(experiment, run_name=job.version, tags=tags).info.run_id
        params = [Param(key, str(value)[:500]) for key, value in flat(job.recipe)]
        for start in range(0, len(params), 100):  # the most that MLflow takes at once
            self._client.log_batch(self._id, params=params[start : start + 100])

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add what was measured after a step."""
        import time

        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[Metric(name, value, now, step) for name, value in metrics.items()])

    def close(self, *, is_finished: bool) -> None:
        """End the run."""
        self._client.set_terminated(self._id, "FINISHED" if is_finished else "KILLED")


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A recipe's values by dotted key."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def uses_wandb() -> bool:
    """Whether it is installed and somebody is logged in, or WANDB_MODE asks for offline."""
    if not importlib.util.find_spec("wandb"):
        return False
    import wandb

    mode = wandb.setup().settings.mode
    is_used = mode in ("offline", "dryrun") or (mode != "disabled" and bool(wandb.login(prompt=False)))
    if not is_used and wandb.run is None:
        wandb.teardown()  # its process was begun to ask; a job that is stopped would end in a traceback of its end
    return is_used


def uses_mlflow() -> bool:
    """Whether it is installed and MLFLOW_TRACKING_URI or the caller names a server or database."""
    if not importlib.util.find_spec("mlflow"):
        return False
    import mlflow

    return bool(mlflow.is_tracking_uri_set())


KINDS: dict[str, tuple[Callable[[], bool], Callable[[Job], Service]]] = {
    "wandb": (uses_wandb, Wandb),
    "mlflow": (uses_mlflow, MLflow),
}


class Services:
    """All that follow a run. One that fails is named once and left out: a run does not end because a service does."""

    def __init__(self, job: Job, progress: Progress) -> None:
        """Ask those that are set up."""
        self._progress = progress
        self._open: dict[str, Service] = {}
        self.is_finished = False
        """To be said before `close`."""
        for name, (is_wanted, make) in KINDS.items():
            with self._guarded(name):
                if is_wanted():
                    self._open[name] = make(job)

    def log(self, rows: Iterable[Row]) -> None:
        """Hand on what the run reports."""
        for row in rows:
            metrics = {
                name: float(value) for name, value in row.items()
                if name not in NOT_METRICS and isinstance(value, (int, float))
            }  # fmt: skip
            for name, service in tuple(self._open.items()) if metrics else ():
                with self._guarded(name):
                    service.log(int(row["step"]), metrics)

    def close(self) -> None:
        """Let them all end."""
        for name, service in tuple(self._open.items()):
            with self._guarded(name):
                service.close(is_finished=self.is_finished)

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of any kind: networks, servers, other people's code
            self._open.pop(name, None)
            reason = " ".join(str(error).split())[:200]
            self._progress("tracking", 0, 0, f"{name}: {type(error).__name__}: {reason}; the run goes on without it")
