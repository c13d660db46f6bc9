"""A student that is judged, of every family that can be distilled: what its teacher sees, and that it learns by it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gtl.config import parse_recipe
from gtl.families import family_class, open_family
from gtl.objectives import make_objective
from gtl.objectives.features import recorded_each
from gtl.tuners import make_tuner
from tests.contract.test_families import MODELS, VARIANTS
from tests.contract.test_pairs import TOKEN_LIMITS, fixed_batch
from tests.overfit import overfit

WALK = [
    pytest.param(model, marks=pytest.mark.soak if model in VARIANTS else ())
    for model, (family, _) in MODELS.items() if "consistency" in family_class(family).learns
]  # fmt: skip


@pytest.mark.parametrize("model", WALK)
def test_a_student_listens_to_what_its_teacher_sees(tmp_path: Path, written: Callable[[str], Path], model: str) -> None:
    family: Any = open_family(str(written(model)))
    family.token_limits = {**family.token_limits, **TOKEN_LIMITS.get(family.name, {})}
    recipe = parse_recipe({
        "model": {"source": str(family.folder)}, "data": {"source": str(tmp_path)},
        "tuner": {"type": "lora", "rank": 4, "targets": "all-linear"},
        "objective": {"type": "consistency", "solver_steps": 4, "adversarial": 1.0, "r1": 0.1},
    })  # fmt: skip
    objective, tuner = make_objective(recipe.objective, family), make_tuner(recipe.tuner, family)
    main = family.load(family.main)
    trainable = tuner.apply({family.main: main}, seed=0)
    players = objective.players({family.main: main}, torch.float32)
    student, judge = players["student"], players["discriminator"]
    batch = fixed_batch(family, recipe)

    sections = family.sections(main)
    assert len(sections) > 1 and family.middle(main) in sections
    with recorded_each(main, [name for name, _ in sections]) as outputs, torch.no_grad():
        student.drawn(batch)
    for (name, width), found in zip(sections, outputs, strict=True):
        assert found and {tensor.shape[1 if tensor.dim() == 4 else 2] for tensor in found} == {width}, name

    losses = overfit(judge, judge.parameters(), batch, 20, 3e-2)
    assert all(parameter.grad is None for parameter in main.parameters())
    assert losses[0] == pytest.approx(2.0, abs=0.2) and losses[-1] < 0.95 * losses[0], "the two can be told apart"
    heard = student(batch)
    heard.total.backward()
    moved = [name for name, parameter in trainable.items() if parameter.grad is not None]
    # The last block of some has layers that only change what is not read any more.
    assert len(moved) > 0.8 * len(trainable) and torch.isfinite(heard.total)
    assert float(heard.parts["adversarial"]) > 0, "what is drawn is known for it"
