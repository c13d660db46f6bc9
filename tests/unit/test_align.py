"""Objective align: its distances of two samples, its reversed gradient, and what of a recipe it refuses."""

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gtl.config import parse_recipe
from gtl.config.objectives import AlignObjective
from gtl.data.plan import Plan, check_domains, places
from gtl.families import open_family
from gtl.objectives import make_objective
from gtl.objectives.align import Aligned, Reversal, coral, mmd
from gtl.objectives.features import pooled, recorded
from gtl.train.assemble import outline
from gtl.train.footprint import measure
from gtl.types import Batch, Entry, Geometry, Item, Record, UserError

TARGET = "builtin:scenes?style=neon&count=12"
SOURCES = [{"source": TARGET}, {"source": "builtin:scenes?count=96"}]


def masks(source: int, target: int, others: int = 0) -> tuple[Tensor, Tensor]:
    kinds = torch.tensor([0] * source + [1] * target + [2] * others)
    return (kinds == 0).float(), (kinds == 1).float()


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_coral_is_the_distance_of_numpys_covariances() -> None:
    features = rows(9, 5)
    source, target = masks(4, 3, others=2)
    found = coral(features, source, target)
    one, two = (np.cov(features[part].double().numpy().T) for part in (slice(0, 4), slice(4, 7)))
    assert float(found) == pytest.approx(((one - two) ** 2).sum() / (4 * 5**2), rel=1e-5)
    moved = torch.cat([features[:4], features[:4] + 3.0])
    assert float(coral(moved, *masks(4, 4))) == pytest.approx(0, abs=1e-12), "a shift is no difference of covariances"


def test_mmd_is_the_unbiased_estimate() -> None:
    """By hand, pair by pair."""
    features = rows(7, 3).double()
    source, target = masks(3, 2, others=2)
    counted = [features[i] for i in range(5)]
    squares = [float((counted[i] - counted[j]).square().sum()) for i in range(5) for j in range(5) if i != j]
    unit = sum(squares) / len(squares)

    def kernel(i: int, j: int) -> float:
        square = float((counted[i] - counted[j]).square().sum())
        return sum(math.exp(-square / (unit * scale)) for scale in (0.25, 0.5, 1, 2, 4)) / 5

    within_source = sum(kernel(i, j) for i in range(3) for j in range(3) if i != j) / (3 * 2)
    within_target = (kernel(3, 4) + kernel(4, 3)) / 2
    between = sum(kernel(i, j) for i in range(3) for j in (3, 4)) / (3 * 2)
    expected = within_source + within_target - 2 * between
    assert float(mmd(features, source.double(), target.double())) == pytest.approx(expected, rel=1e-9)


def test_mmd_is_zero_for_equal_samples_on_average_and_not_for_others() -> None:
    same = torch.stack([mmd(rows(8, 3, seed=i), *masks(4, 4)) for i in range(400)])
    assert abs(float(same.mean())) < 3 * float(same.std()) / 20 and float(same.min()) < 0 < float(same.max())
    apart = torch.stack([mmd(rows(8, 3, seed=i) + 2.0 * masks(4, 4)[1][:, None], *masks(4, 4)) for i in range(20)])
    assert float(apart.min()) > float(same.mean() + same.std())
    one = torch.ones(6, 3, requires_grad=True)
    value = mmd(one, *masks(3, 3))
    value.backward()
    assert float(value.detach()) == 0 and torch.equal(one.grad, torch.zeros(6, 3))  # type: ignore[arg-type]


@pytest.mark.parametrize("distance", [mmd, coral])
def test_one_sample_of_a_domain_has_no_distance(distance: Any) -> None:
    features = rows(5, 3).requires_grad_()
    value = distance(features, *masks(4, 1))
    value.backward()
    assert float(value.detach()) == 0 and torch.equal(features.grad, torch.zeros(5, 3))  # type: ignore[arg-type]


def test_the_reversed_gradient_is_the_gradient_times_minus_lambda() -> None:
    features, weight = rows(4, 3).requires_grad_(), rows(3, 1, seed=1).requires_grad_()
    through = Reversal.apply(features, torch.tensor(0.3))
    assert torch.equal(through, features)
    (through @ weight).square().sum().backward()
    plain, same = features.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    (plain @ same).square().sum().backward()
    assert torch.equal(features.grad, -0.3 * plain.grad)  # type: ignore[operator,arg-type]
    assert torch.equal(weight.grad, same.grad)  # type: ignore[arg-type]


def test_features_are_means_over_places_of_one_scale() -> None:
    picture, text = rows(2, 6, 3, 4), rows(2, 5, 6, seed=1)
    found = pooled([text, picture])
    mean = torch.cat([text, picture.flatten(2).transpose(1, 2)], 1).mean(1)
    centred = mean - mean.mean(1, keepdim=True)
    torch.testing.assert_close(found, centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt())


def item(seed: int, is_target: bool) -> Item:
    rng = torch.Generator().manual_seed(seed)
    family = open_family("builtin:tiny")
    moments = {name: torch.randn(family.latent_shape(64, 64), generator=rng) for name in ("mean", "logvar")}
    text = {"encoder_hidden_states": torch.randn(77, family.config("text_encoder")["hidden_size"], generator=rng)}
    return Item(moments, text, text, Geometry((64, 64), (0, 0), (64, 64)), is_target=is_target)


def player_of(**options: Any) -> tuple[Aligned, Batch]:
    """A player over the built-in model, and a batch of two samples of the source, three of the target and a fill."""
    family = open_family("builtin:tiny")
    config = AlignObjective(type="align", target=TARGET, **options)
    objective = make_objective(config, family)
    assert objective.judged == "mse"
    unet = family.load("unet", torch.float32).requires_grad_(True)
    (player,) = objective.players({"unet": unet}, torch.float32).values()
    assert isinstance(player, Aligned)
    samples = [objective.draw(item(i, i > 1), torch.Generator().manual_seed(i)) for i in range(6)]
    return player, Batch(objective.collate(samples), torch.tensor([0.1, 0.3, 0.2, 0.2, 0.2, 0.0]))


def features_of(player: Aligned, batch: Batch) -> Tensor:
    with torch.no_grad(), recorded(player.main, ("mid_block",)) as outputs:
        player.errors(batch)
    return pooled(outputs)


def test_dann_is_the_task_and_a_loss_a_sample_whose_gradient_is_reversed() -> None:
    player, batch = player_of(weight=0.5)
    player.after_step(3, 10)
    scale = 0.5 * (2 / (1 + math.exp(-10 * 0.3)) - 1)
    assert float(player.reversal) == pytest.approx(scale)
    losses = player(batch)
    with torch.no_grad():
        assert player.critic is not None
        logits = player.critic(features_of(player, batch)).squeeze(1)
        _, mse, _ = player.errors(batch)
    target = torch.tensor([0.0, 0, 1, 1, 1, 1])
    entropy = -(target * logits.sigmoid().log() + (1 - target) * (-logits).sigmoid().log())
    torch.testing.assert_close(losses.parts["domain"], (batch.weight * entropy).sum())
    torch.testing.assert_close(losses.total.detach(), (batch.weight * (mse + entropy)).sum())
    halves = [
        player(Batch({name: value[part] for name, value in batch.tensors.items()}, batch.weight[part])).total
        for part in (slice(0, 2), slice(2, 6))
    ]
    torch.testing.assert_close(halves[0] + halves[1], losses.total)

    def gradients() -> dict[str, Tensor]:
        player.zero_grad()
        player(batch).total.backward()
        return {name: p.grad.clone() for name, p in player.named_parameters() if p.grad is not None}

    name = "main.down_blocks.0.resnets.0.conv1.weight"
    reversed_, passed = gradients(), player.passed.clone()
    player.passed.copy_(torch.tensor([0, 10]))
    task = gradients()
    player.zero_grad()
    with recorded(player.main, ("mid_block",)) as outputs:
        player.errors(batch)
    judged = player.critic(pooled(outputs)).squeeze(1)
    nn.functional.binary_cross_entropy_with_logits(judged, target, batch.weight, reduction="sum").backward()
    plain = player.main.down_blocks[0].resnets[0].conv1.weight.grad
    torch.testing.assert_close(reversed_[name] - task[name], -scale * plain, rtol=1e-3, atol=1e-5)
    assert torch.equal(reversed_["critic.0.weight"], task["critic.0.weight"]) and passed.tolist() == [3, 10]


@pytest.mark.parametrize(("method", "distance"), [("mmd", mmd), ("coral", coral)])
def test_the_others_are_of_what_counts_in_a_forward_pass(method: str, distance: Any) -> None:
    player, batch = player_of(method=method, weight=3.0)
    assert player.critic is None
    losses = player(batch)
    expected = distance(features_of(player, batch)[:5], *masks(2, 3))
    torch.testing.assert_close(losses.parts["domain"], expected)
    torch.testing.assert_close(losses.total.detach(), losses.parts["mse"] + 3.0 * expected)
    half = Batch(batch.tensors, batch.weight / 2)
    torch.testing.assert_close(player(half).total, losses.total / 2)


def entries(targets: int, others: int, bucket: tuple[int, int] = (64, 64)) -> list[Entry]:
    return [
        Entry(Record(f"{bucket}{i}", f"{bucket}{i}", bucket, ("a",), is_target=i < targets), bucket, (f"{i}",))
        for i in range(targets + others)
    ]


@pytest.mark.parametrize(("world", "micro_batch"), [(1, 8), (1, 4), (2, 4), (2, 2)])
def test_every_forward_pass_of_a_whole_batch_has_its_share_of_both_domains(world: int, micro_batch: int) -> None:
    given = [*entries(20, 30), *entries(7, 9, (48, 80))]
    plan = Plan(given, 8, seed=3)
    for step in range(3 * plan.steps_per_epoch):
        items = plan.batch(step)
        if any(not item.weight for item in items):
            continue
        share = {(64, 64): 20 / 50, (48, 80): 7 / 16}[given[items[0].entry].bucket]
        for rank in range(world):
            for row in places(8, rank, world, micro_batch):
                found = sum(given[items[place.position].entry].record.is_target for place in row)
                assert math.floor(len(row) * share) <= found <= math.ceil(len(row) * share)


def test_what_too_small_a_batch_cannot_hold_is_named() -> None:
    given = entries(20, 30)
    check_domains(given, 8, 1)
    check_domains(given, 10, 2, world=2, micro_batch=5)
    with pytest.raises(UserError, match=r"^train.batch_size: 2: 20 of 50 images of 64x64 pixels are of objective.targ"):
        check_domains(given, 2, 1)
    with pytest.raises(UserError, match=r"^train.micro_batch: 4: .* not every 2 in a row hold 2 of each domain; raise"):
        check_domains(given, 10, 2, world=2, micro_batch=4)  # five images a worker: three and two
    with pytest.raises(UserError, match=r"^train.batch_size: 8: 0 of 9 images of 80x48 .*, or set data.buckets: false"):
        check_domains([*given, *entries(0, 9, (48, 80))], 8, 1)


@pytest.mark.parametrize(
    ("objective", "source", "message"),
    [
        ({}, SOURCES, "objective.target: missing"),
        ({"target": "builtin:scenes"}, SOURCES, "objective.target: builtin:scenes: is none of data.source: builtin:sc"),
        ({"target": TARGET}, TARGET, rf"objective.target: {re.escape(TARGET)}: is all there is; add the source domain"),
        ({"target": TARGET, "method": "wgan"}, SOURCES, "objective.method"),
        ({"target": TARGET, "weight": 0}, SOURCES, "objective.weight"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_named(objective: dict[str, Any], source: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}") as refused:
        parse_recipe({"model": {"source": "builtin:tiny"}, "objective": {"type": "align", **objective},
                      "data": {"source": source}})  # fmt: skip
    assert "\n" not in str(refused.value)


def test_a_model_that_is_frozen_up_to_its_middle_is_refused() -> None:
    player, batch = player_of()
    player.main.requires_grad_(False)
    with pytest.raises(UserError, match=r"^tuner.freeze_depth: nothing that moves is in front of mid_block"):
        player(batch)


def test_a_plan_counts_the_network_that_judges() -> None:
    family = open_family("builtin:tiny")
    trained = {}
    for method in ("dann", "mmd"):
        recipe = parse_recipe({
            "model": {"source": "builtin:tiny"}, "data": {"source": SOURCES, "resolution": 64},
            "objective": {"type": "align", "target": TARGET, "method": method},
        })  # fmt: skip
        trained[method] = measure(recipe, outline(recipe, "fp32", family)).trained
    _, width = family.middle(family.load("unet", device="meta"))  # type: ignore[attr-defined]
    assert trained["dann"] - trained["mmd"] == width * 256 + 256 + 256 + 1
