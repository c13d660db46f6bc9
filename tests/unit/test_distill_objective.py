"""Objective distill, and the smaller models that it teaches."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gtl.cli import main
from gtl.config import parse_recipe
from gtl.config.objectives import DenoiseObjective, DistillObjective
from gtl.families import open_family
from gtl.families.base import DiffusionFamily
from gtl.families.shrink import shrink
from gtl.objectives import make_objective
from gtl.types import Batch, Geometry, Item, UserError
from tests.tiny import make_sd

UNET = {"layers_per_block": 2}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sd(tmp_path_factory.mktemp("large"), unet_config=UNET)


@pytest.fixture(scope="module")
def small(large: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "small"
    now, before = shrink(str(large), folder, layers=1, drop_middle=True)
    assert now < 0.75 * before
    return folder


def item(seed: int = 0) -> Item:
    rng = torch.Generator().manual_seed(seed)
    moments = {"mean": torch.randn(4, 8, 8, generator=rng), "logvar": torch.randn(4, 8, 8, generator=rng) - 4}
    text = {"encoder_hidden_states": torch.randn(77, 32, generator=rng)}
    return Item(moments, text, text, Geometry(original=(64, 64), crop=(0, 0), target=(64, 64)))


def batch_of(family: DiffusionFamily) -> Batch:
    objective = make_objective(DenoiseObjective(), family)
    samples = [objective.draw(item(i), torch.Generator().manual_seed(100 + i)) for i in range(3)]
    return Batch(objective.collate(samples), torch.tensor([0.5, 0.25, 0.25]))


def test_what_stays_is_as_it_was(large: Path, small: Path) -> None:
    """The first layers of a section, and on the way up the last; nothing else of the model changes."""
    before, now = open_family(str(large)).load("unet").state_dict(), open_family(str(small)).load("unet").state_dict()
    assert not [name for name in now if name.startswith("mid_block") or "down_blocks.0.resnets.1" in name]
    assert torch.equal(now["down_blocks.1.resnets.0.conv1.weight"], before["down_blocks.1.resnets.0.conv1.weight"])
    for part in ("up_blocks.0.resnets.{}.conv1.weight", "up_blocks.1.resnets.{}.conv1.weight"):
        assert torch.equal(now[part.format(0)], before[part.format(0)])
        assert torch.equal(now[part.format(1)], before[part.format(2)])
    teacher, student = open_family(str(large)), open_family(str(small))
    for part in ("vae", "text_encoder"):
        assert teacher.fingerprint(part) == student.fingerprint(part)
    assert teacher.fingerprint("unet") != student.fingerprint("unet")


def sections(unet: nn.Module, noisy: Tensor, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """A UNet's output and what its sections put out."""
    kept: dict[str, Tensor] = {}
    names = [f"{side}_blocks.{i}" for side in ("down", "up") for i in range(len(getattr(unet, f"{side}_blocks")))]
    hooks = [
        unet.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: kept.update({name: out[0] if isinstance(out, tuple) else out})
        )
        for name in names
    ]
    text = batch.tensors["condition.encoder_hidden_states"]
    output = unet(noisy, batch.tensors["t"], text, return_dict=False)[0]
    for hook in hooks:
        hook.remove()
    return output, [kept[name] for name in names]


def test_the_loss_is_the_papers(large: Path, small: Path) -> None:
    """arXiv 2305.15798, section 3.2: the task, the output and the sections, each a mean square; a section's in mean
    squares of the teacher's."""
    student, teacher = (open_family(str(folder)).load("unet") for folder in (small, large))
    family = open_family(str(small))
    batch = batch_of(family)
    config = DistillObjective(type="distill", teacher=str(large), task=0.5, output=2.0, features=3.0)
    objective = make_objective(config, family)
    assert objective.parts == ("unet",) and objective.judged == "mse"
    (player,) = objective.players({"unet": copy.deepcopy(student).requires_grad_(True)}, torch.float32).values()
    losses = player(batch)

    clean, noise, t = (batch.tensors[name] for name in ("clean", "noise", "t"))
    noisy = family.path.add_noise(clean, noise, t)
    with torch.no_grad():
        (mine, own), (theirs, wanted) = (sections(unet, noisy, batch) for unet in (student, teacher))
    task, output = ((mine - other).square().mean((1, 2, 3)) for other in (noise, theirs))
    features = sum(
        (a - b).square().sum((1, 2, 3)) / b.square().sum((1, 2, 3)) for a, b in zip(own, wanted, strict=True)
    )
    expected = (batch.weight * (0.5 * task + 2.0 * output + 3.0 * features)).sum()
    torch.testing.assert_close(losses.total, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses.parts["mse"], (batch.weight * task).sum(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses.parts["output"], (batch.weight * output).sum(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses.parts["features"], (batch.weight * features).sum(), rtol=1e-5, atol=1e-6)
    losses.total.backward()
    moved = {name.partition(".")[0] for name, value in player.named_parameters() if value.grad is not None}
    assert moved == {"main"}, "the teacher stays"


def test_a_teacher_may_be_heard_by_its_output_alone(large: Path, small: Path) -> None:
    family = open_family(str(small))
    objective = make_objective(DistillObjective(type="distill", teacher=str(large), features=0), family)
    (player,) = objective.players({"unet": family.load("unet").requires_grad_(True)}, torch.float32).values()
    losses = player(batch_of(family))
    torch.testing.assert_close(losses.total, losses.parts["mse"] + losses.parts["output"])
    assert losses.parts["features"] == 0


def test_blocks_of_a_transformer_are_as_far_through() -> None:
    from gtl.families.flux import Flux

    def model(joint: int, single: int) -> nn.Module:
        found = nn.Module()
        found.transformer_blocks = nn.ModuleList([nn.Identity() for _ in range(joint)])
        found.single_transformer_blocks = nn.ModuleList([nn.Identity() for _ in range(single)])
        return found

    pairs = Flux.counterparts(object.__new__(Flux), model(2, 1), model(4, 3))
    assert pairs == [("transformer_blocks.0", "transformer_blocks.1"), ("transformer_blocks.1", "transformer_blocks.3"),
                     ("single_transformer_blocks.0", "single_transformer_blocks.2")]  # fmt: skip


def test_a_teacher_that_sees_something_else_is_refused(large: Path, small: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(large, tmp_path / "v")) / "scheduler" / "scheduler_config.json"
    other.write_text(json.dumps({**json.loads(other.read_text()), "prediction_type": "v_prediction"}))
    others = {
        "its vae is not that of model.source": make_sd(tmp_path / "weights", seed=5, unet_config=UNET),
        "predicts another quantity": tmp_path / "v",
    }
    for message, folder in others.items():
        with pytest.raises(UserError, match=rf"^objective.teacher: {folder}: {message}"):
            make_objective(DistillObjective(type="distill", teacher=str(folder)), open_family(str(small)))


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"type": "distill"}, "objective.teacher: missing"),
        ({"type": "distill", "teacher": "x", "output": 0, "features": 0}, "output and features are both 0"),
        ({"type": "distill", "teacher": "x", "prior": {"prompt": "a"}}, "objective.prior"),
    ],
)
def test_what_cannot_work_is_named(tmp_path: Path, objective: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_recipe({"model": {"source": "builtin:tiny"}, "tuner": {"type": "full"}, "objective": objective,
                      "data": {"source": str(tmp_path)}})  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "3"], "--layers: 3: expected 1 to 2, which the model has"),
        (["--layers", "2"], "--layers: nothing is left out; give fewer than the model has"),
        ([], "--layers: nothing is left out"),
    ],
)
def test_the_command_says_what_is_wrong(
    large: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    options: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("sys.argv", ["gtl", "shrink", str(large), "--out", str(tmp_path / "x"), *options])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
