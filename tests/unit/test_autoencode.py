"""Objective autoencode: what is drawn for a sample, and every term of the loss against its formula."""

import math

import pytest
import torch
from torch import Tensor, nn

from gtl.config.objectives import AutoencodeObjective
from gtl.families import open_family
from gtl.families.base import DiffusionFamily
from gtl.objectives import make_objective
from gtl.objectives.autoencode import divergence
from gtl.types import Batch, Geometry, Item, UserError
from tests.tiny import make_sd

FP32 = torch.float32


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> DiffusionFamily:
    return open_family(str(make_sd(tmp_path_factory.mktemp("sd"))))


@pytest.fixture(scope="module")
def vae(family: DiffusionFamily) -> nn.Module:
    return family.load("vae")


def item(pixels: Tensor) -> Item:
    return Item({}, {}, {}, Geometry((64, 64), (0, 0), (64, 64)), pixels=pixels)


def noise_picture(seed: int, height: int = 64, width: int = 64) -> Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def batch_of(family: DiffusionFamily, weights: tuple[float, ...] = (0.5, 0.25, 0.25)) -> Batch:
    objective = make_objective(AutoencodeObjective(), family)
    samples = [
        objective.draw(item(noise_picture(i)), torch.Generator().manual_seed(i)) for i in range(len(weights))
    ]
    return Batch(objective.collate(samples), torch.tensor(weights))


def player(family: DiffusionFamily, vae: nn.Module, dtype: torch.dtype = FP32, **config: float) -> nn.Module:
    objective = make_objective(AutoencodeObjective(**config), family)
    assert objective.parts == ("vae",)
    players = objective.players({"vae": vae}, dtype)
    assert list(players) == ["autoencoder"]
    return players["autoencoder"]


def test_a_draw_is_the_picture_in_its_range_and_noise_of_the_latents_shape(family: DiffusionFamily) -> None:
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1).expand(3, 64, 128)
    objective = make_objective(AutoencodeObjective(), family)
    drawn = objective.draw(item(pixels), torch.Generator().manual_seed(3))
    assert drawn.keys() == {"pixels", "noise"}
    torch.testing.assert_close(drawn["pixels"][:, 0, 0], torch.tensor([-1.0, -0.6, 1.0]))
    assert torch.equal(drawn["noise"], torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(3)))
    stacked = objective.collate([drawn, drawn])
    assert {name: tuple(value.shape) for name, value in stacked.items()} == {
        "pixels": (2, 3, 64, 128), "noise": (2, 4, 8, 16),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("mean", "logvar", "nats"),
    [
        (0.0, 0.0, 0.0),
        (1.0, 0.0, 0.5),
        (0.0, math.log(4), 0.5 * (4 - 1 - math.log(4))),
        (-2.0, -3.0, 0.5 * (4 + math.exp(-3) - 1 + 3)),
    ],
)
def test_the_divergence_from_the_standard_normal(mean: float, logvar: float, nats: float) -> None:
    """Kingma & Welling 2013, appendix B, added up over the latents of an image."""
    moments = {"mean": torch.full((2, 4, 3, 5), mean), "logvar": torch.full((2, 4, 3, 5), logvar)}
    moments["mean"][1], moments["logvar"][1] = 0.0, 0.0
    torch.testing.assert_close(divergence(moments), torch.tensor([nats * 60, 0.0]), rtol=1e-6, atol=1e-6)


def test_the_divergence_agrees_with_torchs() -> None:
    rng = torch.Generator().manual_seed(0)
    mean, logvar = (torch.randn(3, 4, 8, 8, generator=rng) for _ in range(2))
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, (logvar / 2).exp()), normal(0.0, 1.0)).sum((1, 2, 3))
    torch.testing.assert_close(divergence({"mean": mean, "logvar": logvar}), expected)
    assert divergence({"mean": mean.bfloat16(), "logvar": logvar.bfloat16()}).dtype == torch.float32


def test_the_loss_is_that_of_diffusers_own_autoencoder(family: DiffusionFamily, vae: nn.Module) -> None:
    batch = batch_of(family)
    pixels, noise = batch.tensors["pixels"], batch.tensors["noise"]
    posterior = vae.encode(pixels).latent_dist
    error = vae.decode(posterior.mean + posterior.std * noise).sample - pixels
    l1, l2, kl = error.abs().mean((1, 2, 3)), error.square().mean((1, 2, 3)), posterior.kl()
    weight = torch.tensor([0.5, 0.25, 0.25])
    losses = player(family, vae, l1=2.0, l2=0.5, kl=1e-2)(batch)
    torch.testing.assert_close(losses.total, (weight * (2 * l1 + 0.5 * l2 + 0.01 * kl)).sum())
    assert losses.parts.keys() == {"l1", "l2", "kl"}
    for name, value in {"l1": l1, "l2": l2, "kl": kl}.items():
        torch.testing.assert_close(losses.parts[name], (weight * value).sum())
        assert not losses.parts[name].requires_grad


def test_a_filler_counts_nothing(family: DiffusionFamily, vae: nn.Module) -> None:
    train = player(family, vae)
    torch.testing.assert_close(
        train(batch_of(family, (0.5, 0.5, 0.0))).total, train(batch_of(family, (0.5, 0.5))).total
    )


def test_the_divergence_pulls_at_the_encoder_and_not_at_the_decoder(family: DiffusionFamily) -> None:
    encoder, decoder = [], []
    for kl in (0.0, 1.0):
        vae = family.load("vae").requires_grad_(True)
        player(family, vae, kl=kl)(batch_of(family)).total.backward()
        encoder.append(vae.encoder.conv_in.weight.grad)
        decoder.append(vae.decoder.conv_out.weight.grad)
    torch.testing.assert_close(decoder[0], decoder[1])
    assert (encoder[0] - encoder[1]).norm() > 0.1 * encoder[0].norm() > 0


def test_bf16_is_the_networks_and_not_the_losss(family: DiffusionFamily, vae: nn.Module) -> None:
    batch = batch_of(family)
    full, mixed = player(family, vae)(batch), player(family, vae, torch.bfloat16)(batch)
    assert mixed.total.dtype == torch.float32
    torch.testing.assert_close(mixed.total, full.total, rtol=0.02, atol=0)
    assert mixed.total != full.total


def test_a_model_without_a_codec_is_refused() -> None:
    class OnPixels:
        name, codec, learns = "pixels", None, ("autoencode",)

    with pytest.raises(UserError) as caught:
        make_objective(AutoencodeObjective(), OnPixels())
    assert str(caught.value) == "objective.type: autoencode: models of family pixels have no codec to train"
