"""The adversarial objective in parts: losses, penalties, augmentation, its adaptive probability, collapse, recipes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gtl.config import parse_recipe
from gtl.config.objectives import Augmentation
from gtl.data.fill import to_pixels
from gtl.data.scenes.sets import SceneSet
from gtl.families import open_family
from gtl.generate.command import run
from gtl.images import read_recipe
from gtl.objectives.adversarial import critic_loss, distances, follow, slope
from gtl.objectives.augment import LOTS, augment
from gtl.train.collapse import GRACE, STEPS, Collapse
from gtl.types import UserError
from tests.tiny import make_gan, make_sd

ALL = ("color", "translation", "cutout")


def pictures(number: int = 3, side: int = 16) -> Tensor:
    return torch.rand(number, 3, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1


def lots(number: int = 3) -> Tensor:
    return torch.rand(number, LOTS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_losses_are_those_of_their_papers() -> None:
    real, drawn = torch.tensor([0.0, 2.0]), torch.tensor([0.0, -3.0])
    bce = [2 * math.log(2), math.log1p(math.exp(-2)) + math.log1p(math.exp(-3))]
    assert critic_loss("bce", real, drawn).tolist() == pytest.approx(bce)
    assert critic_loss("hinge", real, drawn).tolist() == [2.0, 0.0]
    assert critic_loss("wasserstein", real, drawn).tolist() == [0.0, -5.0]


def test_a_slope_is_the_squared_gradient_of_each_picture_and_moves_the_weights() -> None:
    weight = torch.tensor([[1.0, -2.0], [0.5, 4.0]], requires_grad=True)
    pixels = torch.tensor([[[[1.0, 3.0]]], [[[0.0, 1.0]]]], requires_grad=True)
    logits = (pixels.flatten(1) @ weight).square().sum(1)  # gradient 2 W W' x
    found = slope(logits, pixels)
    expected = (2 * pixels.detach().flatten(1) @ weight.detach() @ weight.detach().T).square().sum(1)
    torch.testing.assert_close(found.detach(), expected)
    found.sum().backward()
    assert weight.grad is not None and (weight.grad != 0).all()


@pytest.mark.parametrize("kind", ALL)
def test_without_probability_nothing_happens_and_with_it_every_picture_changes(kind: str) -> None:
    pixels = pictures()
    assert torch.equal(augment(pixels, lots(), [kind], 0.0), pixels)
    changed = augment(pixels, lots(), [kind], 1.0)
    assert all(not torch.allclose(changed[i], pixels[i]) for i in range(3))
    assert changed.dtype == pixels.dtype and changed.shape == pixels.shape


def test_a_picture_is_changed_as_its_own_lots_say() -> None:
    pixels, drawn = pictures(), lots()
    whole = augment(pixels, drawn, ALL, 0.7)
    for i in range(3):
        assert torch.allclose(augment(pixels[i : i + 1], drawn[i : i + 1], ALL, 0.7)[0], whole[i], atol=1e-12)
    happens = drawn[:, :3] < 0.5
    half = augment(pixels, drawn, ALL, 0.5)
    untouched = [bool(torch.equal(half[i], pixels[i])) for i in range(3)]
    assert untouched == [not bool(row.any()) for row in happens]


def test_augmentation_can_be_differentiated_twice() -> None:
    pixels = pictures(2, 8).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: augment(x, lots(2), ALL, 1.0), (pixels,))
    assert torch.autograd.gradgradcheck(lambda x: augment(x, lots(2), ALL, 1.0).square(), (pixels,))


def test_translation_moves_whole_pixels_and_cutout_takes_a_quarter_at_most() -> None:
    pixels = pictures() + 3  # nothing is 0
    drawn = lots()
    drawn[:, 6:8] = torch.tensor([[0.0, 0.0], [0.999, 0.5], [0.5, 0.5]])
    moved = augment(pixels, drawn, ["translation"], 1.0)
    assert torch.equal(moved[0, :, 2:, 2:], pixels[0, :, :-2, :-2]) and (moved[0, :, :2] == 0).all()
    assert torch.equal(moved[1, :, :-2], pixels[1, :, 2:]) and (moved[1, :, -2:] == 0).all()
    assert torch.equal(moved[2], pixels[2])
    drawn[:, 8:10] = torch.tensor([[0.5, 0.5], [0.0, 0.0], [0.999, 0.5]])
    cut = (augment(pixels, drawn, ["cutout"], 1.0) == 0).all(1).sum((1, 2))
    assert cut.tolist() == [64, 16, 40]


def test_the_probability_follows_how_certain_the_discriminator_is() -> None:
    asked = Augmentation(probability="adaptive", target=0.6, images=100)
    raised = torch.tensor(0)
    for certainty, expected in ((0.9, 32), (0.9, 64), (0.5, 32), (0.5, 0), (0.1, 0), (1.0, 32), (1.0, 64), (1.0, 96)):
        raised = follow(raised, torch.tensor(certainty), torch.tensor(32), asked)
        assert int(raised) == expected
    assert int(follow(raised, torch.tensor(1.0), torch.tensor(32), asked)) == 100


def test_distances_are_of_the_pictures_that_count() -> None:
    pixels = torch.tensor([0.0, 3.0, 4.0, 100.0])[:, None, None, None].expand(4, 1, 2, 2)
    weight = torch.tensor([0.2, 0.2, 0.2, 0.0])
    assert distances(pixels, weight)[:3].tolist() == pytest.approx([7.0, 4.0, 5.0])  # twice, as each has four pixels
    assert distances(pixels[:1], weight[:1]).tolist() == [0.0]


def test_a_collapse_is_told_once_when_it_begins() -> None:
    watch = Collapse(0.3)
    said = []
    for step in range(6 * STEPS):
        is_fallen = step // STEPS in (0, 2, 4, 5)
        row = {"discriminator_spread": 1.0 if is_fallen else 9.0, "discriminator_spread_real": 10.0}
        assert watch.seen(row)["variety"] == pytest.approx(0.1 if is_fallen else 0.9)
        if warning := watch.warning():
            said.append((step, warning))
    assert [step // STEPS for step, _ in said] == [2, 4]
    assert "variety 0.2" in said[0][1] and "below objective.collapse 0.3" in said[0][1]
    assert watch.seen({"loss": 1.0}) == {"loss": 1.0}
    hopeless = Collapse(0.3)
    for step in range(GRACE + 1):
        hopeless.seen({"discriminator_spread": 1.0, "discriminator_spread_real": 10.0})
        assert (hopeless.warning() is not None) == (step == GRACE)
    never = Collapse(0.0)
    for _ in range(STEPS):
        never.seen({"discriminator_spread": 0.0, "discriminator_spread_real": 10.0})
    assert never.warning() is None


def adversarial(**sections: Any) -> dict[str, Any]:
    return {
        "model": {"source": "x"}, "data": {"source": "y"}, "tuner": {"type": "full"},
        "objective": {"type": "adversarial"}, **sections,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"tuner": {"type": "lora"}}, "'adversarial' does not go with tuner.type 'lora'"),
        ({"train": {"zero": {"stage": 3}}}, "train.zero.stage: 3: full with adversarial bears at most 2"),
        ({"train": {"compile": True}}, "train.compile: true: goes block by block"),
        (
            {"train": {"checkpoints": {"best": "val_loss"}}, "data": {"source": "y", "validation": 0.1}},
            "train.checkpoints.best: val_loss: adversarial has no such number",
        ),
        ({"evaluate": {"metrics": ["clip_score"]}}, "evaluate.metrics: clip_score: adversarial has no such number"),
        ({"evaluate": {"prompts": ["a dog"]}}, "evaluate.prompts: adversarial draws from noise alone"),
        ({"tuner": {"type": "full", "train": ["generator"]}}, "both networks learn from each other; leave it out"),
        ({"objective": {"type": "adversarial", "loss": "l2"}}, "objective.loss: 'l2': should be 'bce', 'hinge' or"),
        ({"objective": {"type": "adversarial", "r1": -1}}, "objective.r1: -1: should be greater than or equal to 0"),
        (
            {"objective": {"type": "adversarial", "augmentation": {"kinds": ["flip"]}}},
            "objective.augmentation.kinds.0: 'flip': should be 'color', 'translation' or 'cutout'",
        ),
        (
            {"tuner": {"type": "freeze", "freeze_depth": 1}, "model": {"source": "x", "weights": "random"}},
            "model.weights: random: leaves nothing to build upon",
        ),
        (
            {"tuner": {"type": "freeze", "freeze_depth": 0, "discriminator_depth": 1}, "objective": {}},
            "tuner.discriminator_depth: 1: denoise has no discriminator",
        ),
    ],
)  # fmt: skip
def test_recipes_that_cannot_be_are_refused_in_a_line(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        parse_recipe(adversarial(**sections))
    assert "\n" not in str(caught.value)


def test_each_player_has_its_own_settings() -> None:
    recipe = parse_recipe(
        adversarial(
            train={"learning_rate": 1e-3, "ema": 0.9},
            objective={"type": "adversarial", "discriminator_learning_rate": 4e-3},
        )
    )
    generator, discriminator = recipe.train_of("generator"), recipe.train_of("discriminator")
    assert (generator.learning_rate, generator.ema) == (1e-3, 0.9)
    assert (discriminator.learning_rate, discriminator.ema) == (4e-3, None)
    denoise = parse_recipe(adversarial(objective={"type": "denoise"}, train={"ema": 0.9}))
    assert denoise.train_of("denoiser") is denoise.train


def test_pictures_are_drawn_without_a_prompt(tmp_path: Path) -> None:
    model = str(make_gan(tmp_path / "gan"))
    files = run(out=tmp_path / "out", model=model, count=3, seed=5)
    assert [file.name for file in files] == ["0000.png", "0001.png", "0002.png", "grid.png"]
    assert read_recipe(files[1])["seed"] == 6
    again = run(out=tmp_path / "again", model=model, seed=6)
    assert again[0].read_bytes() == files[1].read_bytes()
    with pytest.raises(
        UserError, match="--prompt: 'a dog': a model of family gan draws from noise alone; leave it out"
    ):
        run(out=tmp_path / "out", model=model, prompt="a dog")
    with pytest.raises(UserError, match="--prompt: neither of --prompt and --prompts given"):
        run(out=tmp_path / "out", model=str(make_sd(tmp_path / "sd")))


def test_the_gan_in_the_box_draws_different_pictures() -> None:
    family = open_family("builtin:gan")
    assert (family.name, family.default_size) == ("gan", (32, 32))
    assert sum(file.stat().st_size for file in family.folder.rglob("*") if file.is_file()) <= 2 * 2**20
    scenes = SceneSet(size=32)
    real = to_pixels([scenes.picture(i)[0] for i in range(64)])
    with torch.inference_mode():
        drawn = family.load("generator")(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
    weight = torch.ones(64)
    assert distances(drawn, weight).mean() > 0.5 * distances(real, weight).mean()
