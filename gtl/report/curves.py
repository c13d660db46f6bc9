"""Which charts the metrics of one or several runs make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gtl.config.metrics import METRICS as SCORED
from gtl.report.chart import Chart, Mark, Series, draw, smooth
from gtl.report.run import Run


@dataclass(frozen=True)
class Metric:
    """How a metric is shown."""

    title: str
    unit: str = ""
    log: bool = False
    zero: bool = False
    smooth: bool = False
    """Each value is so noisy that a mean over steps shows more."""


METRICS = {
    "val_loss": Metric("Validation loss", log=True),
    **{name: Metric(name) for name, metric in SCORED.items() if metric.needs},
    "loss": Metric("Training loss", log=True, smooth=True),
    "learning_rate": Metric("Learning rate", zero=True),
    "grad_norm": Metric("Gradient norm", log=True),
    "images_per_second": Metric("Throughput", unit="images/s", zero=True),
    "tflops": Metric("Arithmetic of one device", unit="TFLOP/s", zero=True),
    "mfu": Metric("Share of the device's peak arithmetic", zero=True),
    "data_wait": Metric("Share of a step spent waiting for data", zero=True),
}
"""In the order of the page. A run with several players puts their names in front; other metrics come last."""
NOT_DRAWN = ("step", "step_seconds", "peak_memory_bytes")
"""What other charts or the table tell."""
STRATA = "val_loss_q"
"""In front of the number of a part of the noise levels, the least noisy first."""


def draw_curves(runs: Sequence[Run]) -> list[Chart]:
    """The charts of a page, with a line for each run."""
    keys = {key for run in runs for row in run.rows for key in row} - {*NOT_DRAWN}
    strata = sorted(key for key in keys if key.startswith(STRATA))
    charts = [draw_metric(key, metric_of(key), runs) for key in sorted(keys - {*strata}, key=place_of)]
    charts[1:1] = draw_strata(strata, runs)
    return [chart for chart in charts if chart is not None]


def known(key: str) -> str | None:
    """The entry of METRICS that a metric is, or is of one player."""
    return key if key in METRICS else next((name for name in METRICS if key.endswith(f"_{name}")), None)


def place_of(key: str) -> tuple[int, str]:
    """For sorting."""
    name = known(key)
    return (len(METRICS) if name is None else list(METRICS).index(name), key)


def metric_of(key: str) -> Metric:
    """How to show a metric."""
    name = known(key)
    if name is None:
        return Metric(key, log=key.endswith("loss"))
    metric = METRICS[name]
    player = key.removesuffix(name).rstrip("_")
    return replace(metric, title=f"{metric.title} ({player})") if player else metric


def draw_metric(key: str, metric: Metric, runs: Sequence[Run]) -> Chart | None:
    """One chart with a line for each run, in the run's colour."""
    lines: list[Series] = []
    longest = max(len(run.series(key)) for run in runs)
    window = max(5, min(50, longest // 20))
    is_smooth = metric.smooth and longest >= 4 * window
    for colour, run in enumerate(runs):
        points = run.series(key)
        label = run.title if len(runs) > 1 else key
        if points and is_smooth:
            mean = f"{label}, mean of {window} steps"
            lines += [Series(label, points, colour, faint=True), Series(mean, smooth(points, window), colour)]
        elif points:
            lines.append(Series(label, points, colour, bounds=run.bounds(key)))
    marks = published(runs) if key in SCORED else []
    return draw(metric.title, lines, unit=metric.unit, log=metric.log, zero=metric.zero, marks=marks)


def published(runs: Sequence[Run]) -> list[Mark]:
    """The steps whose weights were published, where those are not the last."""
    steps = [(run, run.best_step, colour) for colour, run in enumerate(runs)]
    return [
        Mark(step, f"step {step}, published" + (f" as {run.title}" if len(runs) > 1 else ""), colour)
        for run, step, colour in steps if step is not None
    ]  # fmt: skip


def draw_strata(keys: Sequence[str], runs: Sequence[Run]) -> list[Chart | None]:
    """Validation loss by noise level: of one run in one chart, of several in a chart for each level."""
    title = "Validation loss by noise level"
    if len(runs) > 1:
        return [draw_metric(key, Metric(f"{title}: {level(key, keys)}", log=True), runs) for key in keys]
    lines = [Series(level(key, keys), runs[0].series(key), colour) for colour, key in enumerate(keys)]
    return [draw(title, lines, log=True, marks=published(runs))]


def level(key: str, keys: Sequence[str]) -> str:
    """q1 (least noise)."""
    name = key.removeprefix("val_loss_")
    return {keys[0]: f"{name} (least noise)", keys[-1]: f"{name} (most noise)"}.get(key, name)
