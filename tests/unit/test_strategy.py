"""Which kinds of transfer a study tries, by what is known of the images."""

from pathlib import Path

import pytest

from gtl.config import Study
from gtl.config.load import load_study
from gtl.search.strategy import Facts, advise, judged, narrowed
from gtl.types import UserError

KINDS = ("full", "freeze", "lora", "prompt")
STRATEGY = Path(__file__).parents[2] / "tune_configs" / "strategy.yaml"


def facts(images: int, overlap: float | None) -> Facts:
    return Facts("photos", images, overlap, overlap, overlap)


@pytest.mark.parametrize(
    ("images", "overlap", "tried"),
    [
        (24, 0.9, {"lora", "prompt"}),
        (24, 0.1, {"lora", "freeze"}),
        (24, None, {"lora", "freeze"}),
        (1000, 0.9, {"lora", "prompt", "freeze"}),
        (1000, 0.1, {"lora", "freeze", "full"}),
        (100, 0.5, {"lora", "prompt", "freeze"}),  # both bounds are inside
    ],
)
def test_the_four_cases(images: int, overlap: float | None, tried: set[str]) -> None:
    found = advise(facts(images, overlap), KINDS, 100)
    assert [one.kind for one in found] == list(KINDS), "in the order of the study"
    assert {one.kind for one in found if one.is_tried} == tried
    assert len({one.why for one in found}) == len(found)


def test_few_trials_are_spent_on_few_kinds_those_that_move_least_first() -> None:
    found = {one.kind: one for one in advise(facts(1000, 0.1), KINDS, 8)}
    assert {kind for kind, one in found.items() if one.is_tried} == {"lora", "freeze"}
    assert found["full"].why == "8 trials are enough for 2 kinds, 3 of each"
    assert [one.kind for one in advise(facts(1000, 0.1), KINDS, 1) if one.is_tried] == ["lora"]


def test_a_study_of_kinds_that_do_not_suit_has_them_all_the_same() -> None:
    (only,) = advise(facts(24, 0.9), ["full"], 100)
    assert only.is_tried
    assert only.why == f"none of the kinds suits; {judged('full', facts(24, 0.9)).why}"


def test_a_narrowed_study_draws_the_other_kinds_no_more() -> None:
    study = load_study(STRATEGY)
    assert study.kinds == "auto" and study.space["tuner.type"].values == ("lora", "freeze", "full")
    left = narrowed(study, {"lora", "full"})
    assert left.space["tuner.type"].grid == ("lora", "full")
    assert list(left.space) == ["tuner.type", "tuner.rank", "tuner.train", "train.learning_rate"]
    assert Study.model_validate(left.model_dump(mode="json")).space == left.space, "it is a study as any"
    recipe = left.recipe_of({"tuner.type": "full", "tuner.train": ["unet"], "tuner.rank": 8})
    assert recipe.tuner.type == "full"


def test_what_is_known_is_told() -> None:
    assert str(Facts("neon", 24, 0.25, 0.125, 0.5)) == (
        "neon: 24 images (few), far: with what the model draws of their captions they overlap by 0.25 (0.125 to 0.5)"
    )
    assert str(facts(3, None)).startswith("photos: 3 images (few), too few to tell how far")


def test_kinds_auto_needs_kinds() -> None:
    with pytest.raises(UserError, match=r"kinds: auto: chooses among the values of space.tuner.type") as caught:
        load_study(STRATEGY, ["space={train.learning_rate: {loguniform: [1e-4, 1e-2]}}"])
    assert "\n" not in str(caught.value)
