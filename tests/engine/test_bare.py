"""The two loops that `gtl bench train` compares do the same arithmetic."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gtl.bench.loops import Bare, Ours
from gtl.bench.models import write_dataset, write_model
from gtl.bench.train import make_recipe
from gtl.storage import Store
from gtl.train.track import Tracker
from gtl.train.worker import make_loader
from tests.engine.group import Group

NAMES = ("clean", "noise", "t", "condition.encoder_hidden_states")


def run_both(folder: Path) -> tuple[list[float], list[float], list[float]]:
    """Losses of six steps of gtl's loop in two calls, its last step numbers, and the bare loop's losses."""
    cpu = torch.device("cpu")
    family = write_model(folder / "model", "small")
    dataset = write_dataset(Store(folder / "cache"), family, 8)
    recipe = make_recipe(str(folder), 2)
    with Tracker(Store(folder / "run")) as tracker:
        ours, bare = Ours(recipe, dataset, cpu, "fp32", tracker), Bare(recipe, dataset, cpu, "fp32")
        loader = make_loader(dataset, ours.batches, ours.trainee, replace(ours.plan, steps=6), recipe.data.seed, 0)
        by_hand = [float(bare.step(*(batch.tensors[name] for name in NAMES))) for _, (batch,) in loader]
        losses = ours(4) + ours(2)
    return losses, [row["step"] for row in ours.rows], by_hand


def test_both_loops_learn_the_same_from_the_same_draws(solo: Group, tmp_path: Path) -> None:
    [(losses, steps, by_hand)] = solo.run(run_both, tmp_path)
    assert losses == pytest.approx(by_hand, rel=1e-5)
    assert len(set(losses)) == 6
    assert steps == [5, 6]
