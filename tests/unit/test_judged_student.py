"""A second player beside few-step distillation: both losses against their formulas, and what cannot work."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from gtl.config import Recipe, parse_recipe
from gtl.config.objectives import ConsistencyObjective
from gtl.families import open_family
from gtl.families.base import DiffusionFamily
from gtl.objectives import make_objective
from gtl.objectives.features import Heads
from gtl.train.assemble import outline
from gtl.train.blocks import checkpoint_blocks
from gtl.train.footprint import measure
from gtl.types import Batch, UserError
from tests.tiny import make_sd
from tests.unit.test_consistency import adapted, item

FP32 = torch.float32
SETTINGS: dict[str, Any] = {"guidance": 3.0, "solver_steps": 10, "adversarial": 0.5, "adversarial_steps": 2, "r1": 0.8}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> DiffusionFamily:
    return open_family(str(make_sd(tmp_path_factory.mktemp("sd"))))


def batch_of(family: DiffusionFamily, **changes: Any) -> Batch:
    objective = make_objective(ConsistencyObjective(**{**SETTINGS, **changes}), family)
    samples = [objective.draw(item(i), torch.Generator().manual_seed(100 + i)) for i in range(3)]
    return Batch(objective.collate(samples), torch.tensor([0.5, 0.25, 0.25]))


def players_of(family: DiffusionFamily, main: nn.Module, **changes: Any) -> dict[str, Any]:
    objective = make_objective(ConsistencyObjective(**{**SETTINGS, **changes}), family)
    players: dict[str, Any] = objective.players({family.main: main}, FP32)
    for head in players["discriminator"].network.heads if "discriminator" in players else ():
        # So that places do not all look alike.
        head[2].weight.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(head[0].in_features))
    return players


def seen(plain: nn.Module, latents: Tensor, batch: Batch, family: DiffusionFamily) -> list[Tensor]:
    """What the sections of a UNet put out for latents under the batch's veil, by hooks of our own."""
    noisy = family.path.add_noise(latents, batch.tensors["veil"], batch.tensors["veiled"])
    found: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    hooks = [each.register_forward_hook(keep) for each in (*plain.down_blocks, plain.mid_block, *plain.up_blocks)]
    plain(noisy, batch.tensors["veiled"], batch.tensors["condition.encoder_hidden_states"])
    for hook in hooks:
        hook.remove()
    rows = [each.flatten(2).mT for each in found]
    return [layer_norm(each, each.shape[2:]) for each in rows]


def drawn(unet: nn.Module, batch: Batch, family: DiffusionFamily) -> Tensor:
    """What an epsilon model makes of noisy latents at once."""
    clean, noise, t = (batch.tensors[name] for name in ("clean", "noise", "drawn_at"))
    noisy = family.path.add_noise(clean, noise, t)
    epsilon = unet(noisy, t, batch.tensors["condition.encoder_hidden_states"], return_dict=False)[0]
    return family.path.consistent(noisy, epsilon, t)


def test_what_is_judged_is_drawn_from_the_samplers_times(family: DiffusionFamily) -> None:
    judged, plain = batch_of(family), batch_of(family, adversarial=0.0)
    assert judged.tensors.keys() - plain.tensors.keys() == {"drawn_at", "veil", "veiled"}
    assert all(torch.equal(value, judged.tensors[name]) for name, value in plain.tensors.items())
    for steps, times in ((1, {999}), (2, {499, 999}), (4, {249, 499, 749, 999})):
        objective = make_objective(ConsistencyObjective(**{**SETTINGS, "adversarial_steps": steps}), family)
        draws = [objective.draw(item(), torch.Generator().manual_seed(i)) for i in range(60)]
        assert {int(draw["drawn_at"]) for draw in draws} == times
        if steps < 4:  # with four, the sampler of consistency models rounds
            assert times == set(family.sampler(steps, 64, 64, "lcm").timesteps.tolist())
        assert len({int(draw["veiled"]) for draw in draws}) > 40


def test_the_student_adds_how_little_it_looks_like_the_data(family: DiffusionFamily) -> None:
    plain, unet = adapted(family)
    batch, players = batch_of(family), players_of(family, unet)
    assert list(players) == ["student", "discriminator"]
    (alone,) = players_of(family, unet, adversarial=0.0).values()
    judge = players["discriminator"]
    logits = judge.network(*seen(plain, drawn(unet, batch, family), batch, family))
    unlike = -torch.stack([each.mean(1) for each in logits]).mean(0)
    wanted = alone(batch).total + 0.5 * (batch.weight * unlike).sum()
    moving = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    by_hand = torch.autograd.grad(wanted, moving)

    losses = players["student"](batch)
    torch.testing.assert_close(losses.total, wanted)
    torch.testing.assert_close(losses.parts["adversarial"], (batch.weight * unlike).sum())
    losses.total.backward()
    for parameter, gradient in zip(moving, by_hand, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)
    assert all(parameter.grad is None for parameter in judge.parameters())
    with torch.no_grad():
        assert players["student"](batch).parts.keys() == {"mse"}, "what is held out is not judged"


def test_recomputed_blocks_are_the_teachers_too(family: DiffusionFamily) -> None:
    """On the way back through the teacher adapters are off, also in blocks that run a second time."""
    _, unet = adapted(family)
    again = copy.deepcopy(unet)
    checkpoint_blocks(again, [name for names in family.blocks(again) for name in names])
    batch, gradients = batch_of(family), []
    for model in (unet, again):
        players_of(family, model.train())["student"](batch).total.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert any(gradient.abs().max() > 1e-4 for gradient in gradients[0])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_the_second_player_has_hinge_and_r1(family: DiffusionFamily) -> None:
    plain, unet = adapted(family)
    batch, players = batch_of(family), players_of(family, unet)
    judge = players["discriminator"]
    with torch.no_grad():
        of_data = seen(plain, batch.tensors["clean"], batch, family)
        of_drawn = seen(plain, drawn(unet, batch, family), batch, family)
    losses, slopes = [], []
    for head, real, made in zip(judge.network.heads, of_data, of_drawn, strict=True):
        real.requires_grad_()
        one, two = head(real).squeeze(2), head(made).squeeze(2)
        losses.append((1 - one).relu().mean(1) + (1 + two).relu().mean(1))
        (gradient,) = torch.autograd.grad(one.sum(), real, create_graph=True)
        slopes.append(gradient.square().sum(2).mean(1))
    hinge, r1 = torch.stack(losses).mean(0), torch.stack(slopes).mean(0)
    told = judge(batch)
    torch.testing.assert_close(told.total, (batch.weight * (hinge + 0.4 * r1)).sum())
    torch.testing.assert_close(told.parts["r1"], (batch.weight * r1).sum())
    told.total.backward()
    assert all(parameter.grad is not None for parameter in judge.parameters())
    assert all(parameter.grad is None for parameter in unet.parameters())


def test_it_begins_when_it_is_told_to(family: DiffusionFamily) -> None:
    _, unet = adapted(family)
    batch, players = batch_of(family), players_of(family, unet, adversarial_after=3)
    student, judge = players["student"], players["discriminator"]
    for done, begun in ((2, False), (3, True)):
        student.after_step(done, 10)
        assert (judge(batch) is not None) == ("adversarial" in student(batch).parts) == begun


def test_all_weights_move_beside_a_teacher_that_stays(family: DiffusionFamily) -> None:
    unet = family.load(family.main).requires_grad_(True)
    batch, players = batch_of(family), players_of(family, unet)
    student = players["student"]
    assert student.teacher is not None and student.teacher is not unet
    assert {id(p) for p in student.parameters() if p.requires_grad} == {id(p) for p in unet.parameters()}
    before = student.shown(batch)[0]
    student(batch).total.backward()
    assert all(parameter.grad is not None for parameter in unet.conv_in.parameters())
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.05)
    after, made = student.shown(batch)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert not any(torch.equal(one, other) for one, other in zip(after, made, strict=True))
    (alone,) = make_objective(ConsistencyObjective(), family).players({family.main: adapted(family)[1]}, FP32).values()
    assert alone.teacher is None, "under adapters it is the model itself"


def test_heads_are_the_same_in_every_run() -> None:
    one, two = Heads([8, 16]), Heads([8, 16])
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())
    logits = one(torch.randn(2, 5, 8), torch.randn(2, 7, 16))
    assert [tuple(each.shape) for each in logits] == [(2, 5), (2, 7)]
    assert all(each.unique().numel() == 1 for each in logits), "nothing is told apart yet"


def recipe(objective: dict[str, Any], **changes: Any) -> Recipe:
    return parse_recipe({
        "model": {"source": "builtin:tiny"}, "data": {"source": "photos"},
        "objective": {"type": "consistency", **objective}, **changes,
    })  # fmt: skip


@pytest.mark.parametrize(
    ("objective", "changes", "line"),
    [
        ({"adversarial": -0.1}, {}, "objective.adversarial: -0.1: should be greater than or equal to 0"),
        ({"adversarial": True}, {}, "objective.adversarial: True: should not be true or false"),
        ({"adversarial_steps": 0}, {}, "objective.adversarial_steps: 0: should be greater than or equal to 1"),
        ({"adversarial_after": -1}, {}, "objective.adversarial_after: -1: should be greater than or equal to 0"),
        ({"r1": -1}, {}, "objective.r1: -1: should be greater than or equal to 0"),
        ({"discriminator_learning_rate": 0}, {}, "objective.discriminator_learning_rate: 0: should be greater than 0"),
        ({"type": "denoise", "adversarial": 0.1}, {}, "objective.adversarial"),
        ({"adversarial": 0.1}, {"train": {"zero": {"stage": 3}}},
         "train.zero.stage: 3: lora with consistency bears at most 2"),
        ({"adversarial": 0.1}, {"tuner": {"type": "full", "train": ["unet"]}, "model":
         {"source": "builtin:tiny", "quantization": "nf4"}}, "model.quantization: 'nf4': full moves the model's own"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_one_line(objective: dict[str, Any], changes: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        recipe(objective, **changes)
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_what_the_model_cannot_do_is_one_line(tmp_path: Path) -> None:
    few = open_family(str(make_sd(tmp_path, scheduler_config={"num_train_timesteps": 100})))
    with pytest.raises(UserError, match="^objective.adversarial_steps: 200: expected at most 100, the steps that the"):
        make_objective(ConsistencyObjective(adversarial=0.1, adversarial_steps=200), few)
    with pytest.raises(UserError, match="^objective.type: consistency: a model of family gan learns adversarial"):
        make_objective(ConsistencyObjective(adversarial=0.1), open_family("builtin:gan"))


@pytest.mark.parametrize("after", [0, 50])
def test_a_plan_has_room_for_both(after: int) -> None:
    family = open_family("builtin:tiny")
    found = []
    for weight in (0.0, 0.1):
        asked = recipe({"adversarial": weight, "adversarial_after": after}, data={"source": "photos", "resolution": 64})
        found.append(measure(asked, outline(asked, "fp32", family)))
    alone, judged = found
    _, widths = zip(*family.sections(family.load("unet", device="meta")), strict=True)  # type: ignore[attr-defined]
    assert widths == (32, 64, 96, 96, 96, 64, 32)
    assert judged.trained - alone.trained == sum((width + 1) * 128 + 128 + 1 for width in widths)
    assert judged.per_image.whole > 1.5 * alone.per_image.whole, "the student draws a second time, and is looked at"
    codec = parse_recipe({
        "model": {"source": "builtin:tiny"}, "data": {"source": "photos", "resolution": 64},
        "tuner": {"type": "full", "train": ["vae"]},
        "objective": {"type": "autoencode", "adversarial": 0.1, "adversarial_after": after},
    })  # fmt: skip
    assert measure(codec, outline(codec, "fp32", family)).trained > 2_000_000, "its codec has but 656,000"


def test_the_rest_of_a_recipe_follows() -> None:
    assert recipe({}).max_zero_stage == 3 and recipe({"adversarial": 0.1}).max_zero_stage == 2
    train = recipe({"discriminator_learning_rate": 0.01}, train={"ema": 0.9}).train_of("discriminator")
    assert (train.learning_rate, train.ema) == (0.01, None)
    assert recipe({}, tuner={"type": "full"}).sampler == "lcm"
