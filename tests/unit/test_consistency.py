"""Objective consistency: what is drawn for a sample, the loss against its formula, and the sampler for it."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gtl.config import parse_recipe
from gtl.config.objectives import ConsistencyObjective
from gtl.config.tuners import LoraTuner
from gtl.families import open_family
from gtl.families.base import DiffusionFamily
from gtl.objectives import make_objective
from gtl.tuners import make_tuner
from gtl.types import Batch, Geometry, Item, UserError, sampler_of
from tests.tiny import make_sd

FLOW = {"scheduler": "FlowMatchEulerDiscreteScheduler", "scheduler_config": {"shift": 3.0}}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> DiffusionFamily:
    return open_family(str(make_sd(tmp_path_factory.mktemp("sd"))))


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> DiffusionFamily:
    return open_family(str(make_sd(tmp_path_factory.mktemp("flow"), **FLOW)))


def item(seed: int = 0) -> Item:
    rng = torch.Generator().manual_seed(seed)
    moments = {"mean": torch.randn(4, 8, 8, generator=rng), "logvar": torch.randn(4, 8, 8, generator=rng) - 4}
    text = {"encoder_hidden_states": torch.randn(77, 32, generator=rng)}
    null = {"encoder_hidden_states": torch.ones(77, 32)}
    return Item(moments, text, null, Geometry(original=(64, 64), crop=(0, 0), target=(64, 64)))


def batch_of(family: DiffusionFamily, **config: object) -> Batch:
    objective = make_objective(ConsistencyObjective(**config), family)
    samples = [objective.draw(item(i), torch.Generator().manual_seed(100 + i)) for i in range(3)]
    return Batch(objective.collate(samples), torch.tensor([0.5, 0.25, 0.25]))


def adapted(family: DiffusionFamily) -> tuple[nn.Module, nn.Module]:
    """The model as it was, and with a LoRA on it that changes what it predicts."""
    plain = family.load(family.main)
    unet = copy.deepcopy(plain)
    trained = make_tuner(LoraTuner(rank=4, targets="all-linear"), family).apply({family.main: unet}, seed=0)
    for name, parameter in trained.items():
        if name.endswith("lora_B.weight"):
            parameter.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(len(name)))
    return plain, unet


@torch.no_grad()
def raw(model: nn.Module, noisy: Tensor, t: Tensor, batch: Batch, text: str) -> Tensor:
    """The network's output, by diffusers' own call."""
    return model(noisy, t, batch.tensors[f"{text}.encoder_hidden_states"], return_dict=False)[0]


def test_a_draw_has_two_neighbours_of_the_teachers_times_and_both_conditions(family: DiffusionFamily) -> None:
    batch = batch_of(family)
    shapes = {name: tuple(value.shape) for name, value in batch.tensors.items()}
    assert shapes == {
        "clean": (3, 4, 8, 8), "noise": (3, 4, 8, 8), "t": (3,), "earlier": (3,),
        "condition.encoder_hidden_states": (3, 77, 32), "empty.encoder_hidden_states": (3, 77, 32),
    }  # fmt: skip
    assert torch.equal(batch.tensors["empty.encoder_hidden_states"], torch.ones(3, 77, 32))
    assert set((batch.tensors["t"] - batch.tensors["earlier"]).tolist()) == {20}
    assert set(((batch.tensors["t"] + 1) % 20).tolist()) == {0}
    assert not [name for name in batch_of(family, guidance=1.0).tensors if name.startswith("empty.")]


def test_validation_draws_from_one_quarter_of_the_way(family: DiffusionFamily) -> None:
    objective = make_objective(ConsistencyObjective(), family)
    for stratum in range(4):
        drawn = [int(objective.draw(item(), torch.Generator().manual_seed(i), stratum)["t"]) for i in range(40)]
        assert min(drawn) >= 250 * stratum and max(drawn) < 250 * (stratum + 1) + 20


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_the_loss_is_the_distance_from_where_the_teachers_step_leads(family: DiffusionFamily, guidance: float) -> None:
    """arXiv 2310.04378, algorithm 1, written out for an epsilon model with DDIM."""
    plain, unet = adapted(family)
    batch = batch_of(family, guidance=guidance, huber=0.01)
    clean, noise, t, s = (batch.tensors[name] for name in ("clean", "noise", "t", "earlier"))
    table = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)
    at, before = table[t].view(-1, 1, 1, 1), table[s].view(-1, 1, 1, 1)

    def consistent(noisy: Tensor, times: Tensor, alpha: Tensor) -> Tensor:
        x0 = (noisy - (1 - alpha).sqrt() * raw(unet, noisy, times, batch, "condition")) / alpha.sqrt()
        scaled = 10.0 * times.view(-1, 1, 1, 1)
        return 0.25 / (scaled**2 + 0.25) * noisy + scaled / (scaled**2 + 0.25).sqrt() * x0

    noisy = at.sqrt() * clean + (1 - at).sqrt() * noise
    epsilon = raw(plain, noisy, t, batch, "condition")
    if guidance > 1:
        empty = raw(plain, noisy, t, batch, "empty")
        epsilon = empty + guidance * (epsilon - empty)
    x0 = (noisy - (1 - at).sqrt() * epsilon) / at.sqrt()
    target = consistent(before.sqrt() * x0 + (1 - before).sqrt() * epsilon, s, before)
    error = consistent(noisy, t, at) - target
    wanted = (batch.weight * ((error**2 + 0.01**2).sqrt() - 0.01).mean(dim=(1, 2, 3))).sum()

    objective = make_objective(ConsistencyObjective(guidance=guidance, huber=0.01), family)
    (player,) = objective.players({family.main: unet}, torch.float32).values()
    losses = player(batch)
    torch.testing.assert_close(losses.total, wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses.parts["mse"], (batch.weight * error.square().mean(dim=(1, 2, 3))).sum(),
                               rtol=1e-4, atol=1e-6)  # fmt: skip


def test_only_the_student_gets_a_gradient_and_the_teacher_stays_the_model(family: DiffusionFamily) -> None:
    plain, unet = adapted(family)
    objective, batch = make_objective(ConsistencyObjective(), family), batch_of(family)
    (player,) = objective.players({family.main: unet}, torch.float32).values()
    player(batch).total.backward()
    moved = {name for name, parameter in unet.named_parameters() if parameter.grad is not None}
    assert moved and all("lora_" in name for name in moved)
    noisy, t = batch.tensors["clean"], batch.tensors["t"]
    assert not torch.allclose(raw(unet, noisy, t, batch, "condition"), raw(plain, noisy, t, batch, "condition"))


def test_a_flow_goes_straight_and_is_itself_at_its_end(flow: DiffusionFamily) -> None:
    path = flow.path
    times = path.solver_times(4)
    torch.testing.assert_close(times, torch.tensor([0.0, 500.0, 750.0, 900.0, 1000.0]))  # shift 3
    clean, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    t = torch.tensor([500.0, 900.0])
    noisy = path.add_noise(clean, noise, t)
    torch.testing.assert_close(path.noise_in(noisy, clean, t), noise, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(path.consistent(noisy, noise - clean, t), clean, rtol=1e-4, atol=1e-5)
    assert torch.equal(path.consistent(noisy, torch.randn(2, 4, 8, 8), torch.zeros(2)), noisy)


@pytest.mark.parametrize(("kind", "name"), [("family", "LCMScheduler"), ("flow", "FlowMatchLCMScheduler")])
def test_its_sampler_goes_the_models_own_noise_path(
    request: pytest.FixtureRequest, kind: str, name: str
) -> None:
    family = request.getfixturevalue(kind)
    scheduler, own = family.sampler(4, 64, 64, "lcm"), family.sampler(4, 64, 64)
    assert type(scheduler).__name__ == name != type(own).__name__
    assert len(scheduler.timesteps) == 4
    clean, noise = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    for t in scheduler.timesteps[:1]:
        wanted = family.path.add_noise(clean, noise, t.view(1))
        found = (
            scheduler.scale_noise(clean, t.view(1), noise) if kind == "flow"
            else scheduler.add_noise(clean, noise, t.view(1))
        )  # fmt: skip
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_what_draws_with_several_adapters() -> None:
    assert [sampler_of(each) for each in ([], ["model"], ["model", "lcm"])] == ["model", "model", "lcm"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tuner": {"type": "freeze", "freeze_depth": 1}}, "'consistency' does not go with tuner.type 'freeze'"),
        ({"tuner": {"initialization": "pissa"}}, "tuner.initialization: pissa: takes a part of the model's weights"),
        ({"objective": {"type": "consistency", "solver_steps": 1}}, "objective.solver_steps"),
        ({"objective": {"type": "consistency", "teacher": "x"}}, "objective.teacher"),
    ],
)
def test_what_cannot_work_is_named(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    recipe = {"model": {"source": "builtin:tiny"}, "data": {"source": str(tmp_path)},
              "objective": {"type": "consistency"}, **changes}  # fmt: skip
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        parse_recipe(recipe)


def test_a_teacher_takes_no_more_steps_than_it_was_trained_on(tmp_path: Path) -> None:
    family = open_family(str(make_sd(tmp_path, scheduler_config={"num_train_timesteps": 100})))
    with pytest.raises(UserError, match="objective.solver_steps: 200: expected at most 100"):
        make_objective(ConsistencyObjective(solver_steps=200), family)
