"""What a codec may be taught by beside pixels: features of a network that sees, and patches that one judges."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gtl.config import parse_recipe
from gtl.config.objectives import AutoencodeObjective
from gtl.evaluate.outcomes import measure, values_of
from gtl.families import open_family
from gtl.families.base import DiffusionFamily
from gtl.families.gan_features import VggDiscriminator, positions
from gtl.objectives import make_objective
from gtl.objectives.autoencode import reconstruction
from gtl.objectives.patches import Patches
from gtl.objectives.perceptual import Perceptual, open_perceptual
from gtl.types import Batch, UserError

FP32 = torch.float32


def pictures(number: int, seed: int, height: int = 64, width: int = 64) -> Tensor:
    return torch.rand(number, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_the_distance_is_that_of_unit_features() -> None:
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 7, 3, 2))
    eyes = Perceptual(network, ("0", "2"))
    a, b = pictures(2, 0, 16, 16), pictures(2, 1, 16, 16)
    first, second = network[0](a), network[0](b)
    layers = [(first, second), (network[2](first.relu()), network[2](second.relu()))]
    expected = torch.zeros(2)
    for mine, theirs in layers:
        cosine = nn.functional.cosine_similarity(mine, theirs)  # |u - v|^2 = 2 - 2 u v of unit vectors
        expected += (2 - 2 * cosine).mean((1, 2))
    torch.testing.assert_close(eyes(a, b), expected)
    torch.testing.assert_close(eyes(b, a), expected)
    assert torch.equal(eyes(a, a), torch.zeros(2))


@pytest.mark.parametrize(("height", "width"), [(64, 64), (40, 96)])
def test_the_builtin_network_sees_pictures_of_any_size(height: int, width: int) -> None:
    eyes = open_perceptual("builtin:backbone")
    wanted, drawn = pictures(2, 0, height, width), pictures(2, 1, height, width).requires_grad_()
    before = {name: value.clone() for name, value in eyes.state_dict().items()}
    eyes.train()
    distance = eyes(drawn, wanted)
    assert distance.shape == (2,) and (distance > 0.1).all()
    (gradient,) = torch.autograd.grad(distance.sum(), drawn)
    assert gradient.abs().amax() > 0 and not any(weight.requires_grad for weight in eyes.parameters())
    assert all(torch.equal(value, before[name]) for name, value in eyes.state_dict().items()), "it stays as it is"
    torch.testing.assert_close(eyes(drawn[:1], wanted[:1]), distance[:1], msg="whatever is beside it")


def write_vgg(file: Path) -> VggDiscriminator:
    torch.manual_seed(0)
    vgg = VggDiscriminator()
    convolutions = [layer for layer in vgg.blocks.modules() if isinstance(layer, nn.Conv2d)]
    state = {f"features.{at}.{name}": value for at, layer in zip(positions(), convolutions, strict=True)
             for name, value in layer.state_dict().items()}  # fmt: skip
    torch.save(state, file)
    return vgg


def test_vgg_is_looked_at_before_each_pooling(tmp_path: Path) -> None:
    vgg = write_vgg(tmp_path / "vgg19.pth")
    eyes = open_perceptual(f"vgg19:{tmp_path / 'vgg19.pth'}")
    seen = eyes._features(pictures(1, 0, 32, 48))
    assert [tuple(each.shape[1:]) for each in seen] == [(64, 32, 48), (128, 16, 24), (256, 8, 12), (512, 4, 6)]
    hidden = (pictures(1, 0, 32, 48) / 2 + 0.5 - vgg.mean_pixel) / vgg.deviation
    torch.testing.assert_close(seen[0], vgg.blocks[1][:2](vgg.blocks[0](hidden)))
    with pytest.raises(UserError, match=r"missing.pth: no such file"):
        open_perceptual("vgg19:missing.pth")


def test_patches_are_judged_each_by_itself() -> None:
    network = Patches()
    pixels = pictures(2, 0)
    logits = network(pixels)
    assert logits.shape == (2, 6, 6)
    torch.testing.assert_close(network(pixels[:1]), logits[:1])
    assert torch.equal(Patches()(pixels), logits), "the same weights in every run"
    moved = pixels.clone()
    moved[:, :, :8, :8] += 0.5
    changed = (network(moved) - logits).abs().amax(0)
    # Groups are normalised over the picture, so that all of it has a small part in every logit.
    assert changed[0, 0] > 10 * changed[-1, -1]


@pytest.fixture(scope="module")
def family() -> DiffusionFamily:
    return open_family("builtin:tiny")


def batch_of(family: DiffusionFamily) -> Batch:
    noise = torch.randn(2, *family.latent_shape(64, 64), generator=torch.Generator().manual_seed(5))
    return Batch({"pixels": pictures(2, 3), "noise": noise}, torch.tensor([0.5, 0.5]))


def test_both_players_of_a_codec(family: DiffusionFamily) -> None:
    objective = make_objective(
        AutoencodeObjective(adversarial=0.5, adversarial_after=2, perceptual=2.0), family
    )  # fmt: skip
    codec = family.load("vae").requires_grad_(True)
    players = objective.players({"vae": codec}, FP32)
    assert list(players) == ["autoencoder", "discriminator"]
    mine, judge = players["autoencoder"], players["discriminator"]
    assert not any(parameter.requires_grad for parameter in mine.eyes.parameters())
    assert {id(p) for p in mine.parameters() if p.requires_grad} == {id(p) for p in codec.parameters()}
    batch = batch_of(family)
    assert judge(batch) is None, "it sits out until the codec draws something"
    early = mine(batch)
    assert early.parts.keys() == {"l1", "l2", "kl", "perceptual"}
    parts = early.parts
    torch.testing.assert_close(early.total, parts["l1"] + 1e-6 * parts["kl"] + 2 * parts["perceptual"])
    mine.after_step(2, 10)
    late = mine(batch)
    with torch.no_grad():
        decoded, _ = mine.decoded(batch)
        of_real, of_drawn = (judge.network(each).flatten(1) for each in (batch.tensors["pixels"], decoded))
    torch.testing.assert_close(late.parts["adversarial"], -of_drawn.mean())
    torch.testing.assert_close(late.total, early.total + 0.5 * late.parts["adversarial"])
    late.total.backward()
    assert all(parameter.grad is None for parameter in judge.parameters())
    assert codec.decoder.conv_out.weight.grad.abs().amax() > 0
    codec.zero_grad(set_to_none=True)
    told = judge(batch)
    torch.testing.assert_close(told.total, ((1 - of_real).relu() + (1 + of_drawn).relu()).mean())
    told.total.backward()
    assert all(parameter.grad is not None for parameter in judge.parameters())
    assert all(parameter.grad is None for parameter in codec.parameters())


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"perceptual_network": "lpips"}, r"objective.perceptual_network: 'lpips'"),
        ({"adversarial": -1}, r"objective.adversarial: -1: should be greater than or equal to 0"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, object], line: str) -> None:
    with pytest.raises(UserError, match=line) as caught:
        recipe(change)
    assert "\n" not in str(caught.value)


def test_a_judged_codec_bears_no_sharded_weights() -> None:
    assert recipe({}).max_zero_stage == 3
    assert recipe({"adversarial": 0.1}).max_zero_stage == 2
    with pytest.raises(UserError, match="train.zero.stage: 3: full with autoencode bears at most 2"):
        recipe({"adversarial": 0.1}, zero={"stage": 3})
    assert recipe({"adversarial": 0.1}).train_of("discriminator").ema is None


def recipe(objective: dict[str, object], **train: object):  # type: ignore[no-untyped-def]
    return parse_recipe({
        "model": {"source": "builtin:tiny"}, "tuner": {"type": "full", "train": ["vae"]},
        "objective": {"type": "autoencode", **objective}, "data": {"source": "photos"}, "train": {"ema": 0.9, **train},
    })  # fmt: skip


def test_what_a_codec_made_is_told_of_each_picture(family: DiffusionFamily) -> None:
    """Peak signal-to-noise ratio by hand; structural similarity is 1 of the same and falls with noise."""
    pixels = pictures(3, 0)
    drawn = pixels.clone()
    drawn[1] += 0.2
    drawn[2] = pictures(1, 9)[0]
    drawn = drawn.clamp(-1, 1)
    found = reconstruction(drawn, pixels)
    noise = (drawn - pixels).square().mean((1, 2, 3))
    torch.testing.assert_close(found["psnr"][1:], 20 * torch.log10(2 / noise[1:].sqrt()))
    assert found["psnr"][0] > 70 and found["ssim"][0] == pytest.approx(1.0)
    assert found["ssim"][1] > 0.8 > 0.2 > found["ssim"][2]
    assert reconstruction(drawn[..., :10], pixels[..., :10]).keys() == {"psnr"}, "the window is 11 pixels wide"
    player = make_objective(AutoencodeObjective(), family).players({"vae": family.load("vae")}, FP32)["autoencoder"]
    batch = batch_of(family)
    assert player(batch).outcomes == {}
    with torch.no_grad():
        seen = player(batch).outcomes
    assert {name: tuple(rows.shape) for name, rows in seen.items()} == {"psnr": (2,), "ssim": (2,)}
    assert values_of(measure(seen)) == pytest.approx({name: float(rows.mean()) for name, rows in seen.items()})
    many = measure({"psnr": torch.arange(20.0, 40.0)})["psnr"].whole
    assert many.value == 29.5 and many.low is not None and many.high is not None
    # Two-sided, of 20 images: the standard error is 5.92 / sqrt(20).
    assert many.high - many.low == pytest.approx(2 * 2.093 * 1.323, rel=0.05)


def test_metrics_of_another_objective_are_refused() -> None:
    with pytest.raises(UserError, match="evaluate.metrics: psnr: comes of objective.type: autoencode, and"):
        parse_recipe({
            "model": {"source": "builtin:tiny"}, "data": {"source": "photos", "validation": 0.1},
            "evaluate": {"metrics": ["psnr"]},
        })  # fmt: skip
