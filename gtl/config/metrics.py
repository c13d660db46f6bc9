"""Which metrics there are, which way each is better and what it is computed from: the one table."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator

from gtl.types import UserError


@dataclass(frozen=True)
class Metric:
    """One number about a model."""

    higher_is_better: bool
    needs: Mapping[str, int]
    """What it is computed from, by the argument of its function in `gtl.evaluate.scores` -> the fewest rows of it.

    `real`, `fake`: features of real and of generated images. `logits`: a classifier's, of generated images.
    `image_features`, `text_features`: embeddings of generated images and their prompts in one space.
    `right`: [M, 1], 1 for each generated image that shows what its prompt says and 0 for the others.
    `samples`, `train`, `held_out`: features of generated images, of those trained on and of those kept from training.
    """
    extractor: Literal["backbone", "clip", "reader", "model"] = "backbone"
    """What makes the features: what the recipe's `evaluate` names by that key, or the reader of the built-in scenes;
    model: nothing, since no pictures are drawn."""
    of_each: bool = False
    """Whether it is the mean of scores that generated images have each by itself."""

    @property
    def sign(self) -> int:
        """1 where higher is better, else -1."""
        return 1 if self.higher_is_better else -1


REAL = ("real", "train", "held_out")
"""What of that is about the images of the data."""

METRICS: dict[str, Metric] = {
    "val_loss": Metric(higher_is_better=False, needs={}, extractor="model"),  # see gtl.evaluate.validation
    # See gtl.evaluate.outcomes: of what heads say of held-out images, and of what a codec makes of them.
    "accuracy": Metric(higher_is_better=True, needs={}, extractor="model"),
    "map_50": Metric(higher_is_better=True, needs={}, extractor="model"),
    "psnr": Metric(higher_is_better=True, needs={}, extractor="model"),
    "ssim": Metric(higher_is_better=True, needs={}, extractor="model"),
    "fid": Metric(higher_is_better=False, needs={"real": 100, "fake": 100}),
    "kid": Metric(higher_is_better=False, needs={"real": 3, "fake": 3}),
    "inception_score": Metric(higher_is_better=True, needs={"logits": 100}),
    "clip_score": Metric(
        higher_is_better=True, needs={"image_features": 1, "text_features": 1}, extractor="clip", of_each=True
    ),
    "cmmd": Metric(higher_is_better=False, needs={"real": 3, "fake": 3}, extractor="clip"),
    "precision": Metric(higher_is_better=True, needs={"real": 5, "fake": 5}),
    "recall": Metric(higher_is_better=True, needs={"real": 5, "fake": 5}),
    "density": Metric(higher_is_better=True, needs={"real": 7, "fake": 7}),
    "coverage": Metric(higher_is_better=True, needs={"real": 7, "fake": 7}),
    "diversity": Metric(higher_is_better=True, needs={"fake": 3}),
    "prompt_accuracy": Metric(higher_is_better=True, needs={"right": 1}, extractor="reader", of_each=True),
    "memorization": Metric(higher_is_better=False, needs={"samples": 1, "train": 1, "held_out": 1}),
}


OF_OUTCOMES = {"accuracy": "classify", "map_50": "classify", "psnr": "autoencode", "ssim": "autoencode"}
"""Metrics of what comes of each held-out image -> the objective that they are of. accuracy: the share of right classes.
map_50: of objects the mean average precision, where a box counts as found that has half of both in common with one that
is there. psnr: the peak signal-to-noise ratio of a reconstruction in decibels. ssim: its structural similarity (Wang et
al. 2004)."""


def metric(name: str) -> Metric:
    """The table's row.

    Raises:
        UserError: there is no such metric.
    """
    found = METRICS.get(name)
    if found is None:
        raise UserError(f"evaluate.metrics: {name!r}: no such metric; there are {', '.join(METRICS)}")
    return found


def of_pictures(names: Iterable[str]) -> list[str]:
    """Those metrics that pictures have to be drawn for."""
    return [name for name in names if METRICS[name].extractor != "model"]


def check_metrics(names: Iterable[str], samples: int, clip: str | None, key: str) -> None:
    """Refuse what a model's pictures cannot be measured by.

    Args:
        names: Of metrics.
        samples: Pictures that are drawn.
        clip: `evaluate.clip`.
        key: Of the recipe, that says how many are drawn.

    Raises:
        UserError: names the key.
    """
    for name in names:
        found = metric(name)
        if found.extractor == "clip" and clip is None:
            raise UserError(f"evaluate.clip: null: {name} needs a CLIP model; give its folder or hub id")
        for part, fewest in found.needs.items():
            if part not in REAL and samples < fewest:
                raise UserError(f"{key}: {samples}: {name} needs at least {fewest}")


def check_objective(given: Mapping[str, Iterable[str]], objective: str) -> None:
    """Refuse metrics of another objective.

    Args:
        given: Names of metrics by the key of the recipe that has them.
        objective: Its `objective.type`.

    Raises:
        ValueError: names the key.
    """
    for key, names in given.items():
        for name in names:
            if (wanted := OF_OUTCOMES.get(name, objective)) != objective:
                raise ValueError(f"{key}: {name}: comes of objective.type: {wanted}, and not of {objective}")


def check_name(name: str) -> str:
    """Refuse a metric that there is none of, in a recipe, where the key is named already."""
    if name not in METRICS:
        raise ValueError(f"no such metric; there are {', '.join(METRICS)}")
    return name


MetricName = Annotated[str, AfterValidator(check_name)]
