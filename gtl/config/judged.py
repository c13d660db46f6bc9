"""Whether a study's metrics can judge its trials: are they measured, and do two trials' numbers compare."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gtl.config.explain import parse
from gtl.config.metrics import METRICS, check_metrics
from gtl.types import UserError

if TYPE_CHECKING:
    from gtl.config.recipe import Recipe
    from gtl.config.study import Study

COSTS = ("adapter_bytes", "device_hours", "inference_tflops")
"""What a study may weigh beside metrics: bytes of the published weights, hours of the trial's devices in training, and
10^12 floating-point operations of drawing a picture (`gtl.search.cost`). Lower is better."""
SAME_IMAGES = ("data.flip", "data.crops", "data.gpus_per_encoder", "data.max_broken")
"""Keys of `data` that do not decide which images and captions a metric looks at."""
SAME_LOSS = (
    "objective.min_snr_gamma", "objective.caption_dropout", "objective.image_dropout", "objective.both_dropout",
    "objective.timesteps", "objective.prior", "model.dtype", "model.quantization",
)  # fmt: skip
"""Keys that val_loss does not depend on but through what was learned: see `gtl.objectives`, `judged` and `stratum`."""


def check_judged(study: Study) -> None:
    """Refuse metrics that say nothing about which trial is better.

    Raises:
        UserError: names the key.
    """
    if len(set(study.metrics)) < len(study.metrics):
        raise UserError(f"metric: [{', '.join(study.metrics)}]: should name each metric once")
    if not study.measured:
        raise UserError(
            f"metric: {', '.join(study.metrics)}: the cheapest model learns nothing; add a metric of quality"
        )
    for key in study.space:
        if key == "evaluate.steps" and "inference_tflops" in study.metrics:
            continue
        for name in study.measured:
            if reason := incomparable(key, name):
                raise UserError(f"space.{key}: {reason}")
    check_measured(study.base, study.measured)
    if study.confirm.top and study.metrics[0] in METRICS:
        asked, again = study.base.evaluate, study.confirm.samples
        key = "set.evaluate.samples" if again is None else "confirm.samples"
        check_metrics(study.measured, again or asked.samples, asked.clip, key)


def incomparable(key: str, metric: str) -> str | None:
    """Why trials with several values of a key have numbers that do not compare; None if they do."""
    section = key.partition(".")[0]
    if key == "evaluate.steps":
        return "decides what a picture costs too; add inference_tflops to metric, or put it under set"
    if section == "evaluate":
        return "says how a trial is measured, which has to be one way for all; put it under set"
    if section == "storage":
        return "says where things are kept, which all trials share; put it under set"
    if section == "data" and not key.startswith(SAME_IMAGES):
        return f"{metric} would be of other images or captions for each value; put it under set"
    if metric != "val_loss":
        return None
    if key in ("tuner", "tuner.type"):
        return "val_loss does not tell which kind of transfer is better; take a metric of pictures, such as kid"
    if section in ("objective", "model") and not key.startswith(SAME_LOSS):
        return "each value has a val_loss of its own, which cannot be compared; take a metric of pictures, such as kid"
    return None


def check_measured(recipe: Recipe, metrics: tuple[str, ...]) -> None:
    """Refuse a metric that the recipe lacks something for.

    Raises:
        UserError: names the metric and the key.
    """
    for name in metrics:
        found = METRICS[name]
        if (found.extractor == "model" or "held_out" in found.needs) and not recipe.data.validation:
            raise UserError(f"metric: {name}: needs images that are held out; set data.validation, such as 0.05")
        if found.extractor == "clip" and recipe.evaluate.clip is None:
            raise UserError(f"metric: {name}: needs a CLIP model; set evaluate.clip to its folder or hub id")
        if found.needs and recipe.needs.text == "none":
            raise UserError(f"metric: {name}: is of pictures of prompts, and {recipe.objective.type} draws none")
        if found.needs and recipe.evaluate.prompts == []:
            raise UserError(f"metric: {name}: there is nothing to draw; give evaluate.prompts, or auto")
    values = recipe.model_dump(mode="json")
    values["evaluate"]["beside"]["metrics"] = [*metrics]
    try:
        parse(type(recipe), values)
    except UserError as error:  # such as too few pictures
        raise UserError(f"metric: {error}") from None
