"""Objective denoise: what is drawn for a sample, and the loss against its formula."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gtl.config.objectives import DenoiseObjective, Timesteps
from gtl.families import open_family
from gtl.families.base import DiffusionFamily
from gtl.objectives import make_objective
from gtl.types import Batch, Geometry, Item, UserError
from tests.tiny import make_sd

FLOW = {"scheduler": "FlowMatchEulerDiscreteScheduler", "scheduler_config": {"shift": 3.0}}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> DiffusionFamily:
    return open_family(str(make_sd(tmp_path_factory.mktemp("sd"))))


def tiny(folder: Path, **options: object) -> tuple[DiffusionFamily, nn.Module]:
    """A tiny model of another kind, and its UNet."""
    family = open_family(str(make_sd(folder, **options)))
    return family, family.load("unet")


def item(seed: int = 0) -> Item:
    rng = torch.Generator().manual_seed(seed)
    moments = {"mean": torch.randn(4, 8, 8, generator=rng), "logvar": torch.randn(4, 8, 8, generator=rng) - 4}
    text = {"encoder_hidden_states": torch.randn(77, 32, generator=rng)}
    null = {"encoder_hidden_states": torch.zeros(77, 32)}
    return Item(moments, text, null, Geometry(original=(80, 64), crop=(8, 0), target=(64, 64)))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch_of(family: DiffusionFamily, size: int = 3, **config: object) -> Batch:
    objective = make_objective(DenoiseObjective(**config), family)
    samples = [objective.draw(item(i), seeded(100 + i)) for i in range(size)]
    return Batch(objective.collate(samples), torch.tensor([0.5, 0.25, 0.25, 0.0])[:size])


def part_of(batch: Batch, samples: slice) -> Batch:
    return Batch({name: value[samples] for name, value in batch.tensors.items()}, batch.weight[samples])


def denoiser(family: DiffusionFamily, unet: nn.Module, **config: object) -> nn.Module:
    players = make_objective(DenoiseObjective(**config), family).players({"unet": unet}, next(unet.parameters()).dtype)
    assert list(players) == ["denoiser"]
    return players["denoiser"]


def raw(family: DiffusionFamily, unet: nn.Module, noisy: Tensor, batch: Batch) -> Tensor:
    """The network's output, by diffusers' own call."""
    return unet(noisy, batch.tensors["t"], batch.tensors["condition.encoder_hidden_states"], return_dict=False)[0]


def table(batch: Batch) -> Tensor:
    """alphas_cumprod of SD's scaled-linear schedule at the batch's times, [B, 1, 1, 1]."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return torch.cumprod(1 - betas, 0)[batch.tensors["t"]].view(-1, 1, 1, 1)


def mean_square(error: Tensor, batch: Batch) -> Tensor:
    """The weighted mean over samples of the mean over everything else."""
    return (batch.weight * error.square().mean(dim=(1, 2, 3))).sum()


def test_a_draw_has_these_tensors(family: DiffusionFamily) -> None:
    drawn = make_objective(DenoiseObjective(), family).draw(item(), seeded(1))
    assert {name: (tuple(value.shape), value.dtype) for name, value in drawn.items()} == {
        "clean": ((4, 8, 8), torch.float32),
        "noise": ((4, 8, 8), torch.float32),
        "t": ((), torch.int64),
        "condition.encoder_hidden_states": ((77, 32), torch.float32),
    }
    assert 0 <= drawn["t"] < 1000


def test_clean_is_one_draw_from_the_moments_scaled(family: DiffusionFamily) -> None:
    drawn = make_objective(DenoiseObjective(), family).draw(item(), seeded(1))
    rng, moments = seeded(1), item().latents
    posterior, noise = torch.randn(4, 8, 8, generator=rng), torch.randn(4, 8, 8, generator=rng)
    expected = 0.18215 * (moments["mean"] + torch.exp(0.5 * moments["logvar"]) * posterior)
    torch.testing.assert_close(drawn["clean"], expected)
    assert torch.equal(drawn["noise"], noise)


def test_a_draw_depends_on_its_own_generator_only(family: DiffusionFamily) -> None:
    objective = make_objective(DenoiseObjective(), family)
    alone = objective.draw(item(2), seeded(9))
    torch.manual_seed(4)
    before = torch.get_rng_state()
    batch = objective.collate([objective.draw(item(i), seeded(7 + i)) for i in range(4)])
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(batch[name][2], value) for name, value in alone.items())
    assert not torch.equal(batch["noise"][1], batch["noise"][2])


def test_settings_do_not_change_what_else_is_drawn(family: DiffusionFamily) -> None:
    plain = make_objective(DenoiseObjective(caption_dropout=0), family).draw(item(), seeded(3))
    other = DenoiseObjective(
        caption_dropout=1, offset_noise=0.1, timesteps=Timesteps(distribution="logit_normal", shift=3.0)
    )
    drawn = make_objective(other, family).draw(item(), seeded(3))
    assert torch.equal(drawn["clean"], plain["clean"])
    offset = drawn["noise"] - plain["noise"]
    torch.testing.assert_close(offset, offset.mean(dim=(1, 2), keepdim=True).expand_as(offset), rtol=0, atol=1e-6)
    assert offset[:, 0, 0].abs().min() > 1e-4


def test_offset_noise_is_one_normal_number_a_channel(family: DiffusionFamily) -> None:
    config = DenoiseObjective(offset_noise=0.5)
    plain, offset = (make_objective(c, family) for c in (DenoiseObjective(), config))
    shifts = torch.stack([
        (offset.draw(item(), seeded(i))["noise"] - plain.draw(item(), seeded(i))["noise"])[:, 0, 0] for i in range(500)
    ])
    assert shifts.mean().abs() < 0.03 and abs(shifts.std() - 0.5) < 0.03
    assert torch.corrcoef(shifts.T).fill_diagonal_(0).abs().max() < 0.15


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (1.0, 400), (0.25, 100)])
def test_caption_dropout(family: DiffusionFamily, share: float, expected: int) -> None:
    objective = make_objective(DenoiseObjective(caption_dropout=share), family)
    drawn = [objective.draw(item(), seeded(i))["condition.encoder_hidden_states"] for i in range(400)]
    captions, null = item().conditions["encoder_hidden_states"], item().null_conditions["encoder_hidden_states"]
    dropped = sum(torch.equal(value, null) for value in drawn)
    assert dropped + sum(torch.equal(value, captions) for value in drawn) == 400
    assert abs(dropped - expected) <= (0 if share in (0.0, 1.0) else 26)  # three standard deviations


def spoken(caption: str = "a photo of a dog") -> Item:
    """An item whose text encoder is live: it has no embeddings."""
    return replace(item(), conditions={}, null_conditions={}, caption=caption)


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_without_embeddings_the_caption_or_the_empty_one_is_tokenized(family: DiffusionFamily, dropout: float) -> None:
    objective = make_objective(DenoiseObjective(caption_dropout=dropout), family)
    drawn, plain = objective.draw(spoken(), seeded(1)), objective.draw(item(), seeded(1))
    (expected,) = family.tokenize(["" if dropout else "a photo of a dog"])
    assert drawn.keys() == {"clean", "noise", "t", "token.input_ids"}
    assert torch.equal(drawn["token.input_ids"], expected["input_ids"])
    assert all(torch.equal(drawn[name], plain[name]) for name in ("clean", "noise", "t"))
    batch = objective.collate([drawn, objective.draw(spoken("a cat"), seeded(2))])
    assert batch["token.input_ids"].shape == (2, 77)


def test_a_live_text_encoder_gives_the_loss_of_its_embeddings_and_gets_gradients(family: DiffusionFamily) -> None:
    objective = make_objective(DenoiseObjective(caption_dropout=0.5), family)
    parts = {"unet": family.load("unet"), "text_encoder": family.load("text_encoder")}
    captions = ["a photo of a dog", "a cat", "a red house", "a dog"]
    with torch.no_grad():
        *states, null = family.encode_prompts(parts, [*captions, ""])
    live = [objective.draw(spoken(caption), seeded(i)) for i, caption in enumerate(captions)]
    cached = [
        objective.draw(replace(item(), conditions=own, null_conditions=null), seeded(i)) for i, own in enumerate(states)
    ]
    weight = torch.full((4,), 0.25)
    (player,) = objective.players(parts, torch.float32).values()
    assert {name.split(".")[0] for name, _ in player.named_parameters()} == {"main", "encoders"}
    parts["text_encoder"].requires_grad_(True)
    total = player(Batch(objective.collate(live), weight)).total
    expected = denoiser(family, parts["unet"])(Batch(objective.collate(cached), weight)).total
    torch.testing.assert_close(total, expected)
    total.backward()
    assert all(parameter.grad is not None for parameter in parts["text_encoder"].parameters())


def test_epsilon_loss(family: DiffusionFamily) -> None:
    unet, batch = family.load("unet"), batch_of(family)
    clean, noise, alpha = batch.tensors["clean"], batch.tensors["noise"], table(batch)
    prediction = raw(family, unet, alpha.sqrt() * clean + (1 - alpha).sqrt() * noise, batch)
    losses = denoiser(family, unet)(batch)
    torch.testing.assert_close(losses.total, mean_square(prediction - noise, batch))
    assert list(losses.parts) == ["mse"] and torch.equal(losses.parts["mse"], losses.total)
    assert losses.total.shape == () and losses.total.dtype == torch.float32


def test_velocity_loss(tmp_path: Path) -> None:
    family, unet = tiny(tmp_path, prediction_type="v_prediction")
    batch = batch_of(family)
    clean, noise, alpha = batch.tensors["clean"], batch.tensors["noise"], table(batch)
    prediction = raw(family, unet, alpha.sqrt() * clean + (1 - alpha).sqrt() * noise, batch)
    velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
    torch.testing.assert_close(denoiser(family, unet)(batch).total, mean_square(prediction - velocity, batch))


def test_flow_loss(tmp_path: Path) -> None:
    family, unet = tiny(tmp_path, **FLOW)
    batch = batch_of(family, timesteps=Timesteps(shift="model"))
    clean, noise, t = batch.tensors["clean"], batch.tensors["noise"], batch.tensors["t"]
    assert t.dtype == torch.float32 and t.min() >= 0 and t.max() <= 1000 and not torch.equal(t, t.round())
    share = (t / 1000).view(-1, 1, 1, 1)
    prediction = raw(family, unet, (1 - share) * clean + share * noise, batch)
    torch.testing.assert_close(denoiser(family, unet)(batch).total, mean_square(prediction - (noise - clean), batch))


def test_times_follow_the_recipe(tmp_path: Path) -> None:
    family, _ = tiny(tmp_path, **FLOW)

    def times(**config: object) -> Tensor:
        objective = make_objective(DenoiseObjective(timesteps=Timesteps(**config)), family)
        return torch.stack([objective.draw(item(), seeded(i))["t"] for i in range(5)]) / 1000

    uniform = times()
    torch.testing.assert_close(times(shift=2.0), 2 * uniform / (1 + uniform))
    torch.testing.assert_close(times(shift="model"), 3 * uniform / (1 + 2 * uniform))
    normal = torch.logit(times(distribution="logit_normal"))
    torch.testing.assert_close(
        torch.logit(times(distribution="logit_normal", mean=1.0, std=0.5)), 1 + 0.5 * normal, rtol=1e-4, atol=1e-4
    )


def test_channels_of_a_learned_variance_are_left_alone(tmp_path: Path) -> None:
    family, unet = tiny(tmp_path, unet_config={"out_channels": 8})
    batch = batch_of(family)
    clean, noise, alpha = batch.tensors["clean"], batch.tensors["noise"], table(batch)
    prediction = raw(family, unet, alpha.sqrt() * clean + (1 - alpha).sqrt() * noise, batch)
    assert prediction.shape == (3, 8, 8, 8)
    losses = denoiser(family, unet)(batch)
    torch.testing.assert_close(losses.total, mean_square(prediction[:, :4] - noise, batch))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights(tmp_path: Path, prediction_type: str) -> None:
    family, unet = tiny(tmp_path, prediction_type=prediction_type)
    batch = batch_of(family, 2)
    batch.tensors["t"] = torch.tensor([20, 700])  # SNR about 47 and 0.14
    snr = (table(batch) / (1 - table(batch))).flatten()
    assert snr[0] > 5 > snr[1]
    weight = snr.clamp(max=5) / (snr + 1 if prediction_type == "v_prediction" else snr)
    player, plain = denoiser(family, unet, min_snr_gamma=5.0), denoiser(family, unet)
    each = torch.stack([plain(replace(batch, weight=torch.eye(2)[i])).total for i in range(2)])
    losses = player(batch)
    torch.testing.assert_close(losses.total, (batch.weight * weight * each).sum())
    torch.testing.assert_close(losses.parts["mse"], (batch.weight * each).sum())


def test_min_snr_with_a_flow_is_refused(tmp_path: Path) -> None:
    family, _ = tiny(tmp_path, **FLOW)
    with pytest.raises(UserError, match=r"^objective\.min_snr_gamma: ") as caught:
        make_objective(DenoiseObjective(min_snr_gamma=5.0), family)
    assert "\n" not in str(caught.value)


def test_shares_of_micro_batches_add_up_and_fillers_count_nothing(family: DiffusionFamily) -> None:
    player, batch = denoiser(family, family.load("unet"), min_snr_gamma=5.0), batch_of(family, 4, min_snr_gamma=5.0)
    halves = [part_of(batch, slice(0, 2)), part_of(batch, slice(2, 4))]
    whole, parts = player(batch), [player(half) for half in halves]
    torch.testing.assert_close(parts[0].total + parts[1].total, whole.total)
    torch.testing.assert_close(parts[0].parts["mse"] + parts[1].parts["mse"], whole.parts["mse"])
    torch.testing.assert_close(player(part_of(batch, slice(0, 3))).total, whole.total)


def test_the_total_carries_the_gradient_and_the_parts_do_not(family: DiffusionFamily) -> None:
    unet = family.load("unet").requires_grad_(True)
    losses = denoiser(family, unet)(batch_of(family))
    assert losses.total.requires_grad and not losses.parts["mse"].requires_grad


def test_a_bf16_model_computes_in_bf16_and_its_loss_in_fp32(family: DiffusionFamily) -> None:
    batch = batch_of(family)
    unet = family.load("unet", torch.bfloat16)
    dtypes = set()
    unet.conv_out.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    low, full = denoiser(family, unet)(batch).total, denoiser(family, family.load("unet"))(batch).total
    assert dtypes == {torch.bfloat16} and low.dtype == torch.float32
    assert 0 < (low - full).abs() < 0.01 * full
