"""Kinds of transfer that are advised, for every family: each one's recipe fits its model and moves some of it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from gtl.config import load_study
from gtl.families import denoising, open_family
from gtl.search.space import configurations
from gtl.search.strategy import KIND, Facts, advise, narrowed
from gtl.train.assemble import outline
from tests.contract.test_families import FIRST

SHIPPED = Path(__file__).parents[2] / "tune_configs" / "strategy.yaml"
CASES = {
    "few and far": Facts("images", 24, 0.1), "few and near": Facts("images", 24, 0.9),
    "many and far": Facts("images", 400, 0.1), "many and near": Facts("images", 400, 0.9),
}  # fmt: skip


@pytest.mark.parametrize("name", FIRST.values())
def test_every_kind_that_is_advised_fits_every_family(written: Callable[[str], Path], name: str) -> None:
    family = denoising(open_family(str(written(name))))
    study = load_study(SHIPPED, [
        f"recipe.model.source={written(name)}", f"recipe.tuner.train=[{family.main}]",
        f"space.tuner.train.choice=[[{family.main}]]", "searcher.type=random",
    ])  # fmt: skip
    kinds = study.space[KIND].values
    moved: dict[str, int] = {}
    for case, facts in CASES.items():
        tried = [one.kind for one in advise(facts, kinds, 18) if one.is_tried]
        assert tried, case
        for values in configurations(narrowed(study, tried)):
            kind = str(values[KIND])
            assert kind in tried
            if kind not in moved:
                recipe = study.recipe_of(values)
                trainee = outline(recipe, "fp32", denoising(open_family(recipe.model.source)))
                moved[kind] = sum(parameter.numel() for parameter in trainee.parameters.values())
    assert moved.keys() == {"lora", "freeze", "full"}
    assert 0 < moved["lora"] < moved["full"] and 0 < moved["freeze"] <= moved["full"]
