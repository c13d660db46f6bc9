"""The loss on held-out images as a score: its interval, and how two models' go together."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gtl.evaluate.estimate import difference
from gtl.evaluate.held_out import val_loss
from gtl.evaluate.intervals import student_t
from gtl.evaluate.result import Evaluation, Sampling, make_score, scores_table
from gtl.report.evaluations import make_scores
from gtl.types import UserError

FACTS = {"extractor": "denoise:0", "resize": "cut as for training", "dtype": "fp32"}


def losses(seed: int, images: int = 12) -> Tensor:
    """[images, strata]"""
    return torch.rand(images, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def names(images: int = 12) -> list[str]:
    return [f"image {i}" for i in range(images)]


def bounds(values: Tensor) -> tuple[float, float]:
    """Student's interval for a mean."""
    margin = student_t(len(values) - 1) * float(values.std()) / math.sqrt(len(values))
    return float(values.mean()) - margin, float(values.mean()) + margin


def test_a_loss_is_a_mean_over_images_with_its_t_interval() -> None:
    table = losses(0)
    found, own = val_loss(table, names()), table.mean(dim=1)
    assert (found.value, found.low, found.high) == pytest.approx((float(table.mean()), *bounds(own)))
    assert (found.num_fake, found.num_real, found.higher_is_better) == (0, 12, False)
    few = val_loss(table[:7], names(7))
    assert (few.value, few.low, few.high) == (pytest.approx(float(table[:7].mean())), None, None)


def test_images_of_two_models_go_in_pairs() -> None:
    first, common = losses(0), losses(1)
    second = first + 0.02 * common - 0.05
    found = difference(val_loss(first, names()), val_loss(second, names()))
    low, high = bounds((first - second).mean(dim=1))
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-3)
    assert (found.is_clear, found.better) == (True, 1)
    alone = val_loss(first, names())
    assert alone.low is not None and alone.high is not None
    assert alone.high - alone.low > 10 * (high - low), "unpaired it could not be told"


def test_copies_of_an_image_are_one_draw() -> None:
    table = losses(0)
    once, twice = val_loss(table, names()), val_loss(torch.cat((table, table)), names() * 2)
    assert (twice.value, twice.low, twice.high) == pytest.approx((once.value, once.low, once.high))
    assert twice.num_real == 12
    assert twice.real is not None and torch.allclose(twice.real, table.mean(dim=1) - table.mean())


def test_a_loss_that_is_no_number_is_refused() -> None:
    table = losses(0)
    table[3, 1] = math.nan
    with pytest.raises(UserError, match=r"^val_loss: NaN or infinity on 1 of 12 held-out images; expected finite num"):
        val_loss(table, names())


def test_parts_are_shown_beside_the_value() -> None:
    score = make_score(val_loss(losses(0), names()), FACTS, {"val_loss_q1": 0.5, "val_loss_q2": 0.25})
    sampling = Sampling(
        prompts=[], negative_prompt="", seed=0, steps=2, guidance=1, height=64, width=64, dtype="fp32"
    )  # fmt: skip
    evaluation = Evaluation(
        adapter="dog@v1", base={}, dataset="d", images=48, held_out=12, sampling=sampling,
        scores={"val_loss": score}, samples=None,
    )  # fmt: skip
    lines = scores_table(evaluation).splitlines()
    assert lines[1].split()[-3:] == ["drawn", "real", "extractor"]
    name, *_, better, real, extractor = lines[2].split(maxsplit=7)
    assert (name, better, real) == ("val_loss", "lower", "12"), "nothing is drawn"
    assert extractor == f"{FACTS['extractor']} ({FACTS['resize']}, {FACTS['dtype']})"
    assert [line.split() for line in lines[3:]] == [["val_loss_q1", "0.5"], ["val_loss_q2", "0.25"]]
    shown = make_scores(evaluation.model_dump(mode="json"), None)
    assert shown.title.endswith(" UTC: 48 real images, 12 of them held out")
    assert [(row["metric"], row["drawn"], row["real"]) for row in shown.rows] == [
        ("val_loss", "", "12"), ("val_loss_q1", "", ""), ("val_loss_q2", "", "")
    ]  # fmt: skip


def test_files_of_other_scores_have_no_parts() -> None:
    score = make_score(val_loss(losses(0), names()), FACTS, {"val_loss_q1": 0.5})
    values = score.model_dump(mode="json")
    assert (values["parts"], values["fake"], len(values["real"])) == ({"val_loss_q1": 0.5}, [], 12)
    del values["parts"]
    assert type(score).model_validate(values).parts == {}
