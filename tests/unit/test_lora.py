"""Tuner lora: what moves, where it starts, what the frozen part costs, and what it exports."""

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from gtl.adapters import apply
from gtl.config.tuners import LoraTuner
from gtl.families import open_family
from gtl.families.base import DiffusionFamily
from gtl.train.place import place
from gtl.tuners import make_tuner
from gtl.tuners.depth import is_under, resolve_depth
from gtl.tuners.lora import Lora, adapt
from gtl.types import UserError
from tests.tiny import make_sd

NUM_BLOCKS = 12  # the tiny UNet's 8 ResNets and 4 transformer blocks


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> DiffusionFamily:
    return open_family(str(make_sd(tmp_path_factory.mktemp("sd"))))


def adapted(
    family: DiffusionFamily, seed: int = 0, dtype: torch.dtype | None = None, **config: object
) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """A fresh UNet with adapters, and their parameters."""
    unet = family.load("unet", dtype)
    return unet, make_tuner(LoraTuner(**config), family).apply({"unet": unet}, seed)


def predict(family: DiffusionFamily, unet: nn.Module) -> Tensor:
    """The UNet's output for fixed inputs."""
    rng = torch.Generator().manual_seed(7)
    noisy = torch.randn(2, 4, 8, 8, generator=rng)
    conditions = {"encoder_hidden_states": torch.randn(2, 77, 32, generator=rng)}
    return family.predict(unet, noisy, torch.tensor([11, 600]), conditions)


def disturb(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Move every parameter, as training does, and return copies under their names."""
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=rng) * (1 + parameter.abs())
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


@pytest.mark.parametrize(
    ("depth", "num_blocks", "expected"),
    [(0, 12, 0), (5, 12, 5), (12, 12, 12), (0.0, 12, 0), (0.5, 12, 6), (0.5, 13, 6), (0.29, 100, 29), (0.999, 12, 11)],
)
def test_depth_is_a_count_or_a_share_rounded_down(depth: int | float, num_blocks: int, expected: int) -> None:
    assert resolve_depth(depth, num_blocks) == expected


def test_depth_beyond_the_blocks_names_both() -> None:
    with pytest.raises(UserError) as caught:
        resolve_depth(99, 12)
    assert str(caught.value) == "tuner.freeze_depth: 99: the model has 12 blocks"


def test_prefixes_end_at_dots() -> None:
    assert is_under("down.1", ["down.1"]) and is_under("down.1.conv.weight", ["down.1"])
    assert not is_under("down.10.conv", ["down.1"]) and not is_under("down", ["down.1"])


@pytest.mark.parametrize("targets", ["attention", "attention+ff", "all-linear", "all-linear+conv", ["to_k", "conv1"]])
def test_exactly_the_targets_get_a_and_b(family: DiffusionFamily, targets: str | list[str]) -> None:
    wanted = family.lora_targets(family.load("unet"), targets)
    unet, parameters = adapted(family, rank=2, targets=targets)
    assert list(parameters) == [f"unet.{name}.lora_{matrix}.weight" for name in wanted for matrix in "AB"]
    for name in wanted:
        a, b = parameters[f"unet.{name}.lora_A.weight"], parameters[f"unet.{name}.lora_B.weight"]
        weight = unet.get_parameter(f"{name}.base_layer.weight")
        assert a.shape == (2, *weight.shape[1:])
        assert b.shape == (weight.shape[0], 2, *(1,) * (weight.dim() - 2))


def test_nothing_but_the_adapters_moves(family: DiffusionFamily) -> None:
    unet, parameters = adapted(family, rank=2, dora=True)
    moving = {id(parameter) for parameter in unet.parameters() if parameter.requires_grad}
    assert moving == {id(parameter) for parameter in parameters.values()}
    assert {name.rsplit(".", 2)[1] for name in parameters} == {"lora_A", "lora_B", "lora_magnitude_vector"}


@pytest.mark.parametrize(("depth", "first"), [(0, 0), (1, 1), (4, 4), (0.5, 6), (11, 11)])
def test_frozen_blocks_get_no_adapter(family: DiffusionFamily, depth: int | float, first: int) -> None:
    unet = family.load("unet")
    blocks = family.blocks(unet)
    assert len(blocks) == NUM_BLOCKS
    learning = [prefix for block in blocks[first:] for prefix in block]
    expected = [name for name in family.lora_targets(unet, "all-linear") if is_under(name, learning)]
    _, parameters = adapted(family, rank=2, targets="all-linear", freeze_depth=depth)
    assert list(parameters) == [f"unet.{name}.lora_{matrix}.weight" for name in expected for matrix in "AB"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"freeze_depth": 99}, "tuner.freeze_depth: 99: the model has 12 blocks"),
        (
            {"freeze_depth": 12},
            "tuner.freeze_depth: 12: freezes all 32 layers of tuner.targets 'attention'; freeze fewer of the 12 blocks",
        ),
        (
            {"targets": ["down_blocks.0.resnets.0.conv1"], "initialization": "pissa"},
            "tuner.initialization: 'pissa': down_blocks.0.resnets.0.conv1 is a convolution; take default or gaussian",
        ),
        (
            {"initialization": "olora", "rank": 64},
            "tuner.rank: 64: olora takes at most rank 16 out of "
            "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        ),
    ],
)
def test_mistakes_are_one_line(family: DiffusionFamily, config: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        adapted(family, **config)
    assert str(caught.value) == message


def test_a_target_that_matches_nothing_is_named(family: DiffusionFamily) -> None:
    with pytest.raises(UserError, match=r"^tuner\.targets: .*to_z"):
        adapted(family, targets=["to_q", "to_z"])


@pytest.mark.parametrize("initialization", ["default", "gaussian", "orthogonal"])
def test_initial_weights_depend_on_seed_and_layer_only(family: DiffusionFamily, initialization: str) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    _, first = adapted(family, seed=5, rank=2, initialization=initialization)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    _, again = adapted(family, seed=5, rank=2, initialization=initialization)
    _, deeper = adapted(family, seed=5, rank=2, initialization=initialization, freeze_depth=4, targets="all-linear")
    _, other = adapted(family, seed=6, rank=2, initialization=initialization)
    assert all(torch.equal(first[name], again[name]) for name in first)
    shared = first.keys() & deeper.keys()
    assert shared and all(torch.equal(first[name], deeper[name]) for name in shared)
    assert not any(torch.equal(first[name], other[name]) for name in first if name.endswith("lora_A.weight"))
    starts = [value for name, value in first.items() if name.endswith("to_q.lora_A.weight")]
    assert not torch.equal(starts[0], starts[1])


def test_random_b_is_zero_a_and_b_of_variance_one_over_rank(family: DiffusionFamily) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    drawn = {}
    for rank in (4, 64):
        _, parameters = adapted(family, seed=5, rank=rank, initialization="random_b", targets="attention")
        assert all(not value.any() for name, value in parameters.items() if name.endswith("lora_A.weight"))
        drawn[rank] = {name: value for name, value in parameters.items() if name.endswith("lora_B.weight")}
        every = torch.cat([value.flatten() for value in drawn[rank].values()])
        assert every.std().item() == pytest.approx(rank**-0.5, rel=4 * (2 * every.numel()) ** -0.5)
        assert every.mean().item() == pytest.approx(0, abs=4 * (rank * every.numel()) ** -0.5)  # standard errors
    assert torch.equal(torch.get_rng_state(), before)
    _, few = adapted(family, seed=5, rank=4, initialization="random_b", freeze_depth=4)
    _, other = adapted(family, seed=6, rank=4, initialization="random_b")
    shared = few.keys() & drawn[4].keys()
    assert shared and all(torch.equal(few[name], drawn[4][name]) for name in shared)
    assert not any(torch.equal(other[name], drawn[4][name]) for name in shared)
    starts = [value for name, value in other.items() if name.endswith("to_q.lora_B.weight")]
    assert not torch.equal(starts[0], starts[1])


def first_step(rank: int, **config: object) -> tuple[Tensor, Tensor]:
    """By how much, per unit of rate, the first step of Adam moves a layer's weight and its output for one input."""
    tuner = LoraTuner(rank=rank, **config)
    torch.manual_seed(0)
    layer, x, wanted = nn.Linear(32, 512, bias=False), torch.randn(32), torch.randn(512)
    before = layer.weight.detach().clone()
    peft = Lora(tuner, cast(DiffusionFamily, None))._peft_config()
    adapter = adapt(layer, peft, 0, random_b=tuner.initialization == "random_b")
    adam = torch.optim.Adam([value for value in adapter.parameters() if value.requires_grad], 1e-6, eps=1e-30)
    (adapter(x) @ wanted).backward()
    adam.step()
    moved = (adapter(torch.eye(32)).T - before).detach() * 1e6
    return moved, moved @ x


@pytest.mark.parametrize("config", [
    {}, {"alpha": 3.0}, {"rslora": True, "alpha": 3.0}, {"initialization": "gaussian"}, {"initialization": "random_b"},
    {"initialization": "random_b", "alpha": 3.0},
])  # fmt: skip
def test_the_first_step_of_adam_is_as_long_as_step_size_says(config: dict[str, object]) -> None:
    lengths = {rank: first_step(rank, **config)[1].norm().item() for rank in (4, 64)}
    sizes = {rank: LoraTuner(rank=rank, **config).step_size for rank in (4, 64)}
    assert sizes[4] and sizes[64]
    assert lengths[64] / lengths[4] == pytest.approx(sizes[64] / sizes[4], rel=0.3)


@pytest.mark.parametrize("rank", [2, 8, 64])
def test_from_a_random_b_adam_moves_every_weight_by_the_rate(rank: int) -> None:
    moved, _ = first_step(rank, initialization="random_b")
    assert moved.square().mean().sqrt().item() == pytest.approx(1, rel=0.05)


def test_step_sizes() -> None:
    found = {
        (initialization, rslora, alpha): LoraTuner(
            rank=16, initialization=initialization, rslora=rslora, alpha=alpha
        ).step_size
        for initialization, rslora, alpha in [
            ("default", False, "auto"), ("default", False, 8.0), ("default", True, 8.0), ("gaussian", False, 8.0),
            ("random_b", False, "auto"), ("random_b", False, 8.0), ("pissa", False, "auto"),
        ]
    }  # fmt: skip
    assert list(found.values()) == [16.0, 8.0, 32.0, 0.5, 1.0, 0.5, None]


@pytest.mark.parametrize("config", [{}, {"initialization": "gaussian"}, {"dora": True}, {"initialization": "pissa"}])
def test_a_bf16_base_starts_as_its_fp32_copy_does(
    family: DiffusionFamily, tmp_path: Path, config: dict[str, object]
) -> None:
    unet = family.load("unet", torch.bfloat16)
    low = make_tuner(LoraTuner(rank=2, **config), family).apply({"unet": unet}, 0)
    place(unet, torch.bfloat16, "cpu")
    assert {parameter.dtype for name, parameter in unet.named_parameters() if ".lora_" not in name} == {torch.bfloat16}
    copy = family.load("unet", torch.bfloat16).float()
    full = make_tuner(LoraTuner(rank=2, **config), family).apply({"unet": copy}, 0)
    assert list(low) == list(full)
    for name, parameter in low.items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, full[name])


def test_frozen_blocks_keep_nothing_and_are_not_visited(family: DiffusionFamily) -> None:
    depth = 6
    unet = family.load("unet")
    frozen = [*family.embedders(unet), *(prefix for block in family.blocks(unet)[:depth] for prefix in block)]
    saved, visited = traced(family, freeze_depth=depth)
    assert sum(saved.values()) > 50 and not [name for name in saved if is_under(name, frozen)]
    assert len(visited) > 50 and not [name for name in visited if is_under(name, frozen)]
    saved, visited = traced(family, freeze_depth=0)
    assert [name for name in saved if is_under(name, frozen)] and [name for name in visited if is_under(name, frozen)]


def traced(family: DiffusionFamily, freeze_depth: int) -> tuple[Counter[str], list[str]]:
    """Tensors kept for the backward pass by leaf module or block, and the leaf modules that backward came through."""
    unet, parameters = adapted(family, rank=2, targets="all-linear", freeze_depth=freeze_depth)
    unet.train()
    running: list[str] = []
    saved: Counter[str] = Counter()
    visited: list[str] = []

    def watch(name: str, module: nn.Module) -> None:
        module.register_forward_pre_hook(lambda *_: running.append(name))
        module.register_forward_hook(lambda *_: running.remove(name))

    def trace(module: nn.Module, inputs: object, output: Tensor, name: str) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: visited.append(name))

    for block in family.blocks(unet):
        for prefix in block:
            watch(prefix, unet.get_submodule(prefix))
    for name, module in unet.named_modules():
        if not list(module.children()):
            watch(name, module)
            module.register_forward_hook(partial(trace, name=name))

    def keep(tensor: Tensor) -> Tensor:
        saved[running[-1] if running else "between"] += 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = predict(family, unet).square().mean()
    loss.backward()
    assert all(parameter.grad is not None for parameter in parameters.values())
    return saved, visited


def test_under_autocast_a_bf16_base_runs_in_bf16_and_no_fp32_copies_of_inputs_are_made(
    family: DiffusionFamily,
) -> None:
    unet, _ = adapted(family, dtype=torch.bfloat16, rank=2)
    base: dict[str, tuple[torch.dtype, torch.dtype]] = {}
    lora: dict[str, torch.dtype] = {}
    for name, module in unet.named_modules():
        if name.endswith(".base_layer"):
            module.register_forward_hook(lambda m, i, o, n=name: base.update({n: (i[0].dtype, o.dtype)}))
        if name.endswith(".lora_A.default"):
            module.register_forward_hook(lambda m, i, o, n=name: lora.update({n: i[0].dtype}))
    with torch.autocast("cpu", torch.bfloat16):
        output = predict(family, unet)
    assert len(base) == len(lora) == 32
    assert output.dtype == torch.bfloat16
    assert {out for _, out in base.values()} == {torch.bfloat16}
    for name, (given, _) in base.items():
        assert lora[name.replace(".base_layer", ".lora_A.default")] == given


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("initialization", ["default", "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora"])
def test_export_works_on_the_published_base(
    family: DiffusionFamily, tmp_path: Path, initialization: str, dora: bool, rslora: bool
) -> None:
    config = LoraTuner(rank=4, alpha=6.0, initialization=initialization, dora=dora, rslora=rslora)
    unet = family.load("unet")
    untouched = predict(family, unet)
    tuner = make_tuner(config, family)
    parameters = tuner.apply({"unet": unet}, 0)
    torch.testing.assert_close(predict(family, unet), untouched, rtol=1e-3, atol=1e-4)
    tensors = disturb(parameters)
    trained = predict(family, unet)
    assert (trained - untouched).abs().max() > 0.05
    tuner.export(tensors, tmp_path)
    fresh = family.load("unet")
    apply({"unet": fresh}, tmp_path)
    torch.testing.assert_close(predict(family, fresh), trained, rtol=1e-3, atol=1e-4)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["r"] == (8 if initialization.startswith(("pissa", "olora")) else 4)


@pytest.mark.parametrize("dora", [False, True])
def test_a_random_b_starts_as_the_base_and_what_is_exported_is_as_any_other(
    family: DiffusionFamily, tmp_path: Path, dora: bool
) -> None:
    unet = family.load("unet")
    untouched = predict(family, unet)
    targets = ["to_q", "conv1"]
    config = LoraTuner(rank=4, alpha=6.0, initialization="random_b", dora=dora, targets=targets)
    tuner = make_tuner(config, family)
    parameters = tuner.apply({"unet": unet}, 0)
    torch.testing.assert_close(predict(family, unet), untouched, rtol=1e-4, atol=1e-5)
    tuner.export(disturb(parameters), tmp_path)
    fresh = family.load("unet")
    apply({"unet": fresh}, tmp_path)
    torch.testing.assert_close(predict(family, fresh), predict(family, unet), rtol=1e-3, atol=1e-4)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["use_rslora"]) == (4, 6, False)
    onwards = family.load("unet")
    make_tuner(LoraTuner(rank=4, dora=dora, targets=targets), family).apply({"unet": onwards}, 0, tmp_path)
    torch.testing.assert_close(predict(family, onwards), predict(family, unet), rtol=1e-3, atol=1e-4)


def test_dropout_is_active_in_training_only(family: DiffusionFamily) -> None:
    unet, parameters = adapted(family, rank=4, dropout=0.5)
    disturb(parameters)
    unet.train()
    assert not torch.equal(predict(family, unet), predict(family, unet))
    unet.eval()
    assert torch.equal(predict(family, unet), predict(family, unet))
