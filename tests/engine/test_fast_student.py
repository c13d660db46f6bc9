"""A student that a second player judges: the same in shares, in the same bits after a stop, and what it leaves."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from gtl.adapters.apply import kind_of
from gtl.families import open_family
from gtl.families.base import Conditions
from gtl.train.checkpoint import State, latest, read_manifest
from gtl.types import Item
from tests.engine.group import Group
from tests.engine.judged import GEOMETRY, STEPS, Outcome, play, recipe_of, same_after_a_stop, told
from tests.engine.runs import go, make_job

TUNERS: dict[str, dict[str, Any]] = {"lora": {"type": "lora", "rank": 4}, "full": {"type": "full"}}
OBJECTIVE = {
    "type": "consistency", "guidance": 3.0, "solver_steps": 8, "adversarial": 0.5, "adversarial_after": 1,
    "adversarial_steps": 2, "r1": 0.5, "discriminator_learning_rate": 1e-2,
}  # fmt: skip


@lru_cache
def conditions() -> tuple[Conditions, Conditions]:
    """Of a prompt and of none."""
    family = open_family("builtin:tiny")
    encoders = {part: family.load(part, torch.float32) for part in family.encoders}
    with torch.no_grad():
        found, null = family.encode_prompts(encoders, ["a red ring", ""])
    return found, null


def latents(rng: torch.Generator) -> Item:
    moments = {"mean": torch.randn(8, 8, 8, generator=rng), "logvar": torch.full((8, 8, 8), -6.0)}
    return Item(moments, *conditions(), GEOMETRY)


def run(tuner: str, stage: int, stop: int, states: dict[str, State] | None = None) -> Outcome:
    return play(recipe_of(TUNERS[tuner], OBJECTIVE, stage), latents, stop, states)


@pytest.mark.parametrize(
    ("tuner", "stage"),
    [("lora", 2), *(pytest.param(*case, marks=pytest.mark.soak) for case in (("lora", 0), ("full", 2)))],
)
def test_both_learn_in_shares_what_they_learn_together(solo: Group, duo: Group, tuner: str, stage: int) -> None:
    ((rows, states, published),) = solo.run(run, tuner, 0, STEPS)
    (shared, again, _), _ = duo.run(run, tuner, stage, STEPS)
    for row, other in zip(told(rows), told(shared), strict=True):
        assert other == pytest.approx(row, rel=1e-3, abs=1e-4)
    # The second player has its turn after the student: from the first step's on, and is listened to from the second.
    assert all("discriminator_loss" in row for row in rows) and rows[-1]["discriminator_learning_rate"] == 1e-2
    assert ["student_adversarial" in row for row in rows] == [False, True, True, True, True]
    assert published and all(name.startswith("unet.") for name in published)
    assert {name.partition(".")[0] for name in states["discriminator"].tensors} == {"network"}
    assert {name.partition(".")[0] for name in states["student"].tensors} == {"unet", "passed"}
    assert (states["student"].steps, states["discriminator"].steps) == (5, 5)
    assert all("ema" not in kinds for kinds in again["discriminator"].tensors.values())


@pytest.mark.parametrize("tuner", ["lora", pytest.param("full", marks=pytest.mark.soak)])
def test_a_judged_student_goes_on_in_the_same_bits(duo: Group, tuner: str) -> None:
    same_after_a_stop(lambda stop, states: duo.run(run, tuner, 0, stop, states)[0])


def test_a_run_keeps_both_and_publishes_a_plain_adapter(tmp_path: Path) -> None:
    job = make_job(tmp_path, TUNERS["lora"], OBJECTIVE, steps=3)
    assert go(job, 1) == [0]
    key = latest(job.run, "checkpoints")
    assert key is not None
    manifest = read_manifest(job.run, key)
    assert list(manifest["players"]) == ["student", "discriminator"]
    heads = manifest["players"]["discriminator"]["parameters"]
    assert len(heads) == 7 * 4 and all(name.startswith("network.heads.") for name in heads)
    folder = Path(job.run.root, "adapter")
    assert kind_of(folder) == "lora"
    rank = json.loads(next(folder.rglob("adapter_config.json")).read_text())["r"]
    assert rank == 4 and not [file for file in folder.rglob("*") if b"heads" in file.read_bytes()[:100_000]]
