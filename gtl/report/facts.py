"""What the tables of a page say about a run."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from gtl.config.metrics import METRICS
from gtl.report.chart import short
from gtl.report.run import Run

Facts = dict[str, str]
"""What is told -> what it is, in the order of the table."""
JUDGED = ("source", "validation", "seed", "resolution")
"""Keys of `data` that decide what a validation loss is measured on."""


def value_at(values: Any, key: str) -> Any:
    """The value at a dotted key of nested dicts; None where it is not there."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def last_step(run: Run) -> int:
    """Optimizer steps made."""
    return int(run.rows[-1]["step"])


def state(run: Run) -> str:
    """How far the run is: finished, stopped early, or neither so far."""
    if run.result is None:
        return "not finished"
    return "stopped early" if stopped_early(run) else "finished"


def stopped_early(run: Run) -> bool:
    """Whether its validations used up the patience before its last step."""
    patience, best = value_at(run.recipe, "train.early_stopping.patience"), value_at(run.result, "best_step")
    if patience is None or best is None or value_at(run.recipe, "train.steps") == last_step(run):
        return False
    metric = value_at(run.recipe, "train.early_stopping.metric")
    return sum(step > best for step, _ in run.series(metric)) >= patience


def summary(run: Run) -> Facts:
    """The numbers that one asks for first."""
    facts = {"Steps": steps(run)}
    losses = finite(run, "loss")
    if losses:
        facts["Training loss"] = f"{short(losses[-1][1])} at step {losses[-1][0]:g}"
    for name, metric in METRICS.items():
        looks = [point for point in finite(run, name) if point[0] > 0]
        if looks:
            step, best = (max if metric.higher_is_better else min)(looks, key=lambda point: point[1])
            title = "validation loss" if name == "val_loss" else name
            facts[f"Best {title}"] = f"{short(best)} at step {step:g}"
            facts[f"Last {title}"] = f"{short(looks[-1][1])} at step {looks[-1][0]:g}"
    if published := value_at(run.result, "best_step"):
        facts["Published weights"] = f"of step {published}"
    facts |= speed(run)
    return facts


def steps(run: Run) -> str:
    """Steps made, of how many."""
    made = last_step(run)
    planned, epochs = value_at(run.recipe, "train.steps"), value_at(run.recipe, "train.epochs")
    if planned is not None and planned != made:
        return f"{made} of {planned}"
    return f"{made} ({epochs} epochs asked for)" if epochs is not None else f"{made}"


def speed(run: Run) -> Facts:
    """What the run took; throughput with what it depends on."""
    facts = {}
    if seconds := finite(run, "step_seconds"):
        facts["Time in steps"] = duration(sum(value for _, value in seconds))
    if (hours := value_at(run.result, "device_hours")) is not None:
        facts["Device time"] = f"{short(hours)} device-hours, start and validation included"
    if device := value_at(run.result, "device"):
        facts["Device"] = str(device)
    if rates := finite(run, "images_per_second"):
        batch, side = value_at(run.recipe, "train.batch_size"), value_at(run.recipe, "data.resolution")
        rate = short(median(rate for _, rate in rates))
        facts["Throughput"] = f"{rate} images/s (median; batch of {batch}, {side} pixels)"
    if memory := finite(run, "peak_memory_bytes"):
        facts["Peak memory"] = f"{max(value for _, value in memory) / 2**30:.2f} GiB of one worker"
    if arithmetic := finite(run, "tflops"):
        facts["Arithmetic"] = f"{short(median(value for _, value in arithmetic))} TFLOP/s of one device (median)"
    if shares := finite(run, "mfu"):
        facts["Utilisation"] = f"{median(value for _, value in shares):.1%} of the device's peak (median)"
    return facts


def finite(run: Run, metric: str) -> list[tuple[float, float]]:
    """(step, value) of the rows where a metric is a finite number."""
    return [point for point in run.series(metric) if math.isfinite(point[1])]


def duration(seconds: float) -> str:
    """For example 1 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"


def lineage(run: Run) -> Facts:
    """Where the adapter comes from."""
    card, recipe = run.card or {}, run.recipe
    dataset, libraries = card.get("dataset") or {}, card.get("libraries") or {}
    facts = {
        "Adapter": run.title if run.card else "not published yet",
        "Base model": value_at(card, "base.source") or value_at(recipe, "model.source"),
        "Revision": value_at(card, "base.revision") or value_at(recipe, "model.revision"),
        "Model fingerprint": value_at(card, "base.fingerprint"),
        "Family": value_at(card, "base.family"),
        "Continues": value_at(recipe, "tuner.init"),
        "Tuner": value_at(recipe, "tuner.type"),
        "Objective": value_at(recipe, "objective.type"),
        "Images": ", ".join(sources(recipe)) + (f" ({dataset['images']} images)" if dataset else ""),
        "Dataset fingerprint": dataset.get("fingerprint"),
        "gtl": card.get("code"),
        "Libraries": ", ".join(f"{name} {version}" for name, version in libraries.items()),
        "Published": f"{card['created'][:19].replace('T', ' ')} UTC" if card else None,
        "Run": run.url,
    }
    return {what: str(value) for what, value in facts.items() if value}


def sources(recipe: dict[str, Any]) -> list[str]:
    """The places of the images."""
    source = value_at(recipe, "data.source")
    return [str(one["source"]) for one in source] if isinstance(source, list) else [str(source)]


def next_commands(run: Run) -> list[str]:
    """What one would type now."""
    if run.card is None:
        return [f"gtl train {shlex.quote(f'{run.url}/recipe.yaml')} --name {run.name} --resume"]
    registry = f"--registry {shlex.quote(str(value_at(run.recipe, 'storage.registry')))}"
    prompts = run.pictures[-1].prompts if run.pictures else ()
    reads_none = value_at(run.recipe, "objective.type") == "adversarial"
    prompt = "" if reads_none else f"--prompt {shlex.quote(prompts[0] if prompts else '...')} "
    return [
        f"gtl generate --adapter {run.title} {prompt}--out drawn {registry}",
        f"gtl adapters promote {run.title} prod {registry}",
        f"gtl adapters export {run.title} --out {run.name} {registry}",
    ]


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Dotted keys of the recipe in which the runs differ -> the value in each."""
    flat = [dict(flatten(run.recipe)) for run in runs]
    keys = dict.fromkeys(key for values in flat for key in values)
    rows = {key: [str(values.get(key, "")) for values in flat] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested dicts."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", "null" if value is None else value


def incomparable(runs: Sequence[Run]) -> list[str]:
    """Why the losses of runs do not measure the same."""
    first, reasons = runs[0], []
    if any(run.recipe.get("objective") != first.recipe.get("objective") for run in runs):
        reasons.append("The runs learn different objectives, so their losses are not the same quantity.")
    judged = [[value_at(run.recipe, f"data.{key}") for key in JUDGED] for run in runs]
    prints = {value_at(run.card, "dataset.fingerprint") for run in runs if run.card}
    if any(one != judged[0] for one in judged) or len(prints) > 1:
        reasons.append("The runs hold out other images, or add other noise to them: compare no validation losses.")
    return reasons
