"""The two loops that `gtl bench train` compares do the same arithmetic, for every model that it knows."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gtl.bench.loops import Bare, Ours
from gtl.bench.models import write_dataset, write_model
from gtl.bench.setting import Setting, settle
from gtl.bench.train import measure, table
from gtl.objectives.denoise import conditions_of
from gtl.storage import Store
from gtl.train.course import make_loader
from gtl.train.track import Tracker
from gtl.types import quiet
from tests.engine.group import Group
from tests.twins import TWINS


def run_both(folder: Path, setting: Setting, more: int) -> tuple[list[float], list[float], list[float], list[float]]:
    """Losses of gtl's loop in two calls, of two steps and of more; its last step numbers; the bare loop's losses, and
    what both loops count of operations that an image needs."""
    cpu = torch.device("cpu")
    family = write_model(folder / "model", setting.model, overrides=TWINS[setting.model])
    dataset = write_dataset(Store(folder / "cache"), family, 8)
    recipe = setting.recipe(str(folder))
    with Tracker(Store(folder / "run")) as tracker:
        ours = Ours(recipe, dataset, cpu, "fp32", tracker)
        bare = Bare(setting.bare_recipe(str(folder)), dataset, cpu, "fp32", ours.trainee)
        whole = replace(ours.plan, steps=2 + more, micro_batch=setting.batch_size)
        by_hand = []
        for _, (batch,) in make_loader(dataset, ours.batches, ours.trainee, whole, recipe.data.seed, 0, cpu):
            clean, noise, t = (batch.tensors[name] for name in ("clean", "noise", "t"))
            by_hand.append(float(bare.step(clean, noise, t, conditions_of(batch.tensors))))
        losses = ours(2) + ours(more)
    counted = ours.rows[-1]["tflops"] * ours.rows[-1]["step_seconds"] / setting.batch_size
    return losses, [row["step"] for row in ours.rows], by_hand, [counted, bare.count() / 1e12]


@pytest.mark.parametrize(
    ("setting", "more"),
    [
        (Setting("small"), 4),
        (Setting("sd15"), 1),
        (Setting("sd2", tuner="full", checkpointing=True), 1),
        (Setting("sdxl", micro_batch=1), 1),
        (Setting("flux", bare_checkpointing=True), 1),
    ],
    ids=lambda value: value.model if isinstance(value, Setting) else "",
)
def test_both_loops_learn_the_same_from_the_same_draws(
    setting: Setting, more: int, solo: Group, tmp_path: Path
) -> None:
    [(losses, steps, by_hand, counted)] = solo.run(run_both, tmp_path, replace(setting, batch_size=2), more)
    assert losses == pytest.approx(by_hand, rel=1e-5)
    assert len(set(losses)) == 2 + more
    assert steps == [3 + i for i in range(more)]
    assert counted[0] == pytest.approx(counted[1], rel=1e-9)


def run_bench(folder: Path) -> tuple[dict[str, Any], str]:
    """A result of the benchmark, and its table."""
    asked = Setting("flux", batch_size=2, steps=1, rounds=1, checkpointing=True, micro_batch=1, bare_batch_size=1)
    result = measure(settle(asked, None), str(folder), torch.device("cpu"), quiet, TWINS["flux"])
    return json.loads(json.dumps(result)), table(result)


def test_utilisation_is_of_the_rate_that_was_measured(solo: Group, tmp_path: Path) -> None:
    [(result, text)] = solo.run(run_bench, tmp_path)
    assert math.isfinite(result["gtl_loss"]) and math.isfinite(result["bare_loss"])
    assert (result["micro_batch"], result["bare_batch_size"], result["resolution"]) == (1, 1, [64, 64])
    for loop in ("gtl", "bare"):
        needed = result["flops_per_image"] * result[f"{loop}_images_per_second"]
        assert result[f"{loop}_utilisation"] == needed / result["matmul_flops"]
    assert result["median_ratio"] == pytest.approx(1 / result["speedup"])
    assert "batch 2, 1 at a time, checkpointing" in text
    assert f"speedup     {result['speedup']:.2f}" in text
