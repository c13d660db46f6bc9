"""Tuners full and freeze: what moves, what the frozen part costs, and how they and lora continue from an adapter."""

from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gtl.adapters import apply
from gtl.config import load_recipe, parse_recipe
from gtl.config.tuners import FreezeTuner
from gtl.families import open_family
from gtl.families.base import DiffusionFamily
from gtl.objectives import make_objective
from gtl.train.assemble import assemble
from gtl.train.place import place
from gtl.tuners import make_tuner
from gtl.tuners.base import Tuner
from gtl.tuners.depth import is_under
from gtl.types import Batch, Geometry, Item, UserError
from tests.tiny import make_sd, write_json

RECIPES = Path(__file__).parents[2] / "gtl" / "recipes"
HEAD = {"conv_norm_out.weight", "conv_norm_out.bias", "conv_out.weight", "conv_out.bias"}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> DiffusionFamily:
    return open_family(str(make_sd(tmp_path_factory.mktemp("sd"))))


def tuner_of(family: DiffusionFamily, **tuner: object) -> Tuner:
    recipe = {"model": {"source": str(family.folder)}, "data": {"source": "s3://b"}, "tuner": tuner}
    return make_tuner(parse_recipe(recipe).tuner, family)


def load(family: DiffusionFamily, *parts: str) -> dict[str, nn.Module]:
    return {part: family.load(part) for part in parts or ("unet",)}


def moving(family: DiffusionFamily, **tuner: object) -> set[str]:
    """Names of the UNet's parameters that move, after a look at their flags."""
    parts = load(family)
    chosen = tuner_of(family, **tuner).apply(parts, 0)
    names = {name.removeprefix("unet.") for name in chosen}
    assert names == {name for name, p in parts["unet"].named_parameters() if p.requires_grad}
    assert all(chosen[f"unet.{name}"] is parts["unet"].get_parameter(name) for name in names)
    return names


def test_full_moves_every_weight_of_the_named_parts(family: DiffusionFamily) -> None:
    unet, encoder = family.load("unet"), family.load("text_encoder")
    assert moving(family, type="full") == {name for name, _ in unet.named_parameters()}
    parts = load(family, "unet", "text_encoder")
    chosen = tuner_of(family, type="full", train=["text_encoder"]).apply(parts, 0)
    assert set(chosen) == {f"text_encoder.{name}" for name, _ in encoder.named_parameters()}
    assert not any(p.requires_grad for p in parts["unet"].parameters())


def test_a_part_that_cannot_be_trained_is_named(family: DiffusionFamily) -> None:
    with pytest.raises(UserError) as caught:
        tuner_of(family, type="full", train=["unet", "vae"]).apply(load(family, "unet", "text_encoder"), 0)
    assert str(caught.value) == "tuner.train: 'vae': what can be trained here is unet, text_encoder"


@pytest.mark.parametrize(("depth", "first"), [(0, 0), (1, 1), (5, 5), (0.5, 6), (12, 12)])
def test_freeze_moves_all_behind_the_depth(family: DiffusionFamily, depth: int | float, first: int) -> None:
    unet = family.load("unet")
    frozen = [prefix for block in family.blocks(unet)[:first] for prefix in block]
    if first:
        frozen += family.embedders(unet)
    expected = {name for name, _ in unet.named_parameters() if not is_under(name, frozen)}
    assert moving(family, type="freeze", freeze_depth=depth) == expected
    assert expected >= HEAD


def test_freezing_all_blocks_leaves_exactly_the_head(family: DiffusionFamily) -> None:
    assert moving(family, type="freeze", freeze_depth=12) == HEAD


def test_the_last_block_by_name(family: DiffusionFamily) -> None:
    block = "up_blocks.1.attentions.1"
    attention = {f"{layer}.weight" for n in (1, 2) for layer in (f"attn{n}.to_q", f"attn{n}.to_k", f"attn{n}.to_v")}
    attention |= {f"attn{n}.to_out.0.{kind}" for n in (1, 2) for kind in ("weight", "bias")}
    inside = attention | {
        f"{layer}.{kind}"
        for layer in ("norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2")
        for kind in ("weight", "bias")
    }
    expected = {f"{block}.transformer_blocks.0.{name}" for name in inside}
    expected |= {f"{block}.proj_out.weight", f"{block}.proj_out.bias"}
    assert moving(family, type="freeze", freeze_depth=11) == expected | HEAD


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        (["cross_attention"], {"attn2.to_q.weight", "attn2.to_k.weight", "attn2.to_v.weight", "attn2.to_out.0.weight",
                               "attn2.to_out.0.bias"}),
        (["norm"], {f"{norm}.{kind}" for norm in ("norm1", "norm2", "norm3") for kind in ("weight", "bias")}),
        (["bias"], {f"{layer}.bias" for layer in ("norm1", "norm2", "norm3", "attn1.to_out.0", "attn2.to_out.0",
                                                  "ff.net.0.proj", "ff.net.2")}),
    ],
)  # fmt: skip
def test_only_some_kinds_of_weights(family: DiffusionFamily, only: list[str], expected: set[str]) -> None:
    found = moving(family, type="freeze", freeze_depth=11, only=only)
    prefix = "up_blocks.1.attentions.1.transformer_blocks.0."
    assert {name.removeprefix(prefix) for name in found if name.startswith(prefix)} == expected
    outside = {
        "cross_attention": set(),
        "norm": {"conv_norm_out.weight", "conv_norm_out.bias"},
        "bias": {"conv_norm_out.bias", "conv_out.bias", "up_blocks.1.attentions.1.proj_out.bias"},
    }
    assert {name for name in found if not name.startswith(prefix)} == outside[only[0]]


SD15_UNET = {
    "_class_name": "UNet2DConditionModel", "act_fn": "silu", "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": False, "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], "downsample_padding": 1,
    "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1,
    "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}  # fmt: skip
"""unet/config.json of Stable Diffusion 1.5."""


def test_the_classic_recipe_moves_the_last_three_resnets_and_transformers(tmp_path: Path) -> None:
    write_json(make_sd(tmp_path) / "unet" / "config.json", SD15_UNET)
    recipe = load_recipe(RECIPES / "portraits_sd15_last_blocks.yaml", [f"model.source={tmp_path}"])
    family = open_family(recipe.model.source)
    with torch.device("meta"):
        unet = family.build("unet")
    assert {parameter.device.type for parameter in unet.parameters()} == {"meta"}
    assert sum(parameter.numel() for parameter in unet.parameters()) == 859_520_964
    blocks = family.blocks(unet)
    assert isinstance(recipe.tuner, FreezeTuner)
    assert (recipe.tuner.freeze_depth, len(blocks)) == (32, 38)
    kinds = [type(unet.get_submodule(prefix)).__name__ for block in blocks[32:] for prefix in block]
    assert Counter(kinds) == {"ResnetBlock2D": 3, "BasicTransformerBlock": 3, "GroupNorm": 3, "Conv2d": 6}

    chosen = make_tuner(recipe.tuner, family).apply({"unet": unet}, 0)
    last = tuple(f"up_blocks.3.{kind}.{i}." for kind in ("resnets", "attentions") for i in range(3))
    names = {name for name, _ in unet.named_parameters() if name.startswith(last)} | HEAD
    assert set(chosen) == {f"unet.{name}" for name in names}
    assert {name for name, parameter in unet.named_parameters() if parameter.requires_grad} == names


def test_kinds_add_up_over_all_blocks(family: DiffusionFamily) -> None:
    each = [moving(family, type="freeze", freeze_depth=0, only=[kind]) for kind in ("norm", "bias", "cross_attention")]
    assert moving(family, type="freeze", freeze_depth=0, only=["norm", "bias", "cross_attention"]) == set.union(*each)
    assert [len(names) for names in each] == [66, 92, 20]


@pytest.mark.parametrize(
    ("tuner", "message"),
    [
        ({"freeze_depth": 99}, "tuner.freeze_depth: 99: the model has 12 blocks"),
        ({"freeze_depth": 12, "only": ["cross_attention"]},
         "tuner.only: cross_attention: no such weights behind tuner.freeze_depth 12; freeze fewer of the 12 blocks"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(family: DiffusionFamily, tuner: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        moving(family, type="freeze", **tuner)
    assert str(caught.value) == message


def test_frozen_blocks_keep_nothing_and_are_not_visited(family: DiffusionFamily) -> None:
    unet = family.load("unet")
    frozen = [*family.embedders(unet), *(prefix for block in family.blocks(unet)[:6] for prefix in block)]
    saved, visited = traced(family, 6)
    assert sum(saved.values()) > 50 and not [name for name in saved if is_under(name, frozen)]
    assert len(visited) > 20 and not [name for name in visited if is_under(name, frozen)]
    saved, visited = traced(family, 0)
    assert [name for name in saved if is_under(name, frozen)] and [name for name in visited if is_under(name, frozen)]


def traced(family: DiffusionFamily, depth: int) -> tuple[Counter[str], list[str]]:
    """Tensors kept for the backward pass by leaf module, and the leaf modules that backward came through."""
    parts = load(family)
    parameters = tuner_of(family, type="freeze", freeze_depth=depth).apply(parts, 0)
    running: list[str] = []
    saved: Counter[str] = Counter()
    visited: list[str] = []

    def trace(module: nn.Module, inputs: object, output: Tensor, name: str) -> None:
        running.remove(name)
        if output.requires_grad:
            output.register_hook(lambda gradient: visited.append(name))

    for name, module in parts["unet"].named_modules():
        if not list(module.children()):
            module.register_forward_pre_hook(lambda *_, name=name: running.append(name))
            module.register_forward_hook(partial(trace, name=name))

    def keep(tensor: Tensor) -> Tensor:
        saved[running[-1] if running else "between"] += 1
        return tensor

    rng = torch.Generator().manual_seed(7)
    states = {"encoder_hidden_states": torch.randn(2, 77, 32, generator=rng)}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        noisy = torch.randn(2, 4, 8, 8, generator=rng)
        loss = family.predict(parts["unet"], noisy, torch.tensor([11, 600]), states).square().mean()
    loss.backward()
    assert all(parameter.grad is not None for parameter in parameters.values())
    return saved, visited


def batch_of(family: DiffusionFamily) -> Batch:
    """Two samples whose captions are tokens."""
    recipe = parse_recipe({"model": {"source": str(family.folder)}, "data": {"source": "s3://b"}})
    objective, rng = make_objective(recipe.objective, family), torch.Generator().manual_seed(0)
    moments = {"mean": torch.randn(4, 8, 8, generator=rng), "logvar": torch.zeros(4, 8, 8)}
    geometry = Geometry((64, 64), (0, 0), (64, 64))
    items = [Item(moments, {}, {}, geometry, caption) for caption in ("a dog", "a cat")]
    draws = [objective.draw(item, torch.Generator().manual_seed(i)) for i, item in enumerate(items)]
    return Batch(objective.collate(draws), torch.full((2,), 0.5))


def loss_of(family: DiffusionFamily, parts: dict[str, nn.Module]) -> float:
    recipe = parse_recipe({"model": {"source": str(family.folder)}, "data": {"source": "s3://b"}})
    (player,) = make_objective(recipe.objective, family).players(parts, torch.float32).values()
    with torch.no_grad():
        return float(player(batch_of(family)).total)


def learned(
    family: DiffusionFamily, folder: Path, earlier: Path | None = None, **tuner: object
) -> tuple[float, float, dict[str, nn.Module]]:
    """Losses before and after every trained weight has moved, and the model; what was learned is in the folder."""
    parts = load(family, "unet", "text_encoder")
    made = tuner_of(family, **tuner)
    chosen = made.apply(parts, 1, earlier)
    before = loss_of(family, parts)
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in chosen.values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=rng)
    made.export({name: value.detach().clone() for name, value in chosen.items()}, folder)
    return before, loss_of(family, parts), parts


LORA = {"type": "lora", "rank": 4, "alpha": 8, "train": ["unet", "text_encoder"]}


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"type": "full", "train": ["unet", "text_encoder"]}, {"type": "full", "train": ["unet", "text_encoder"]}),
        ({"type": "full", "train": ["unet", "text_encoder"]}, {"type": "freeze", "freeze_depth": 9}),
        ({"type": "freeze", "freeze_depth": 6}, {"type": "freeze", "freeze_depth": 0, "only": ["bias"]}),
        (LORA, LORA),
        (LORA, {**LORA, "alpha": 2}),
        (LORA, {**LORA, "rslora": True}),
        ({**LORA, "dora": True}, {**LORA, "dora": True}),
        ({"type": "lora", "rank": 2, "initialization": "pissa"}, {"type": "lora", "rank": 4}),
    ],
)
def test_a_run_starts_where_the_earlier_one_ended(
    family: DiffusionFamily, tmp_path: Path, first: dict[str, object], then: dict[str, object]
) -> None:
    base, end, _ = learned(family, tmp_path / "first", **first)
    assert abs(end - base) > 1e-4 * base
    start, after, parts = learned(family, tmp_path / "then", tmp_path / "first", init="first", **then)
    exact = first["type"] != "lora"
    assert start == end if exact else start == pytest.approx(end, rel=1e-5)
    assert abs(after - start) > 1e-4 * start
    fresh = load(family, "unet", "text_encoder")
    apply(fresh, tmp_path / "then")
    assert loss_of(family, fresh) == pytest.approx(after, rel=1e-5)


def test_what_the_earlier_adapter_moved_stays_in_the_later_delta(family: DiffusionFamily, tmp_path: Path) -> None:
    learned(family, tmp_path / "first", **LORA)
    _, _, parts = learned(family, tmp_path / "then", tmp_path / "first", init="a", type="freeze", freeze_depth=12)
    stored = load_file(tmp_path / "then" / "delta.safetensors")
    layers = {name.rpartition(".lora_")[0] for name in load_file(tmp_path / "first/pytorch_lora_weights.safetensors")}
    assert set(stored) == {f"{layer}.weight" for layer in layers} | {f"unet.{name}" for name in HEAD}
    assert not any(".lora_" in name for part in parts.values() for name, _ in part.named_parameters())


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        ({"type": "freeze", "freeze_depth": 9}, {"type": "lora"}, "it is a delta; lora continues from a lora"),
        ({"type": "lora", "rank": 4}, {"type": "lora", "rank": 8},
         "its rank is 4 in unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q; tuner.rank is 8"),
        ({"type": "lora", "rank": 4, "targets": ["to_q", "to_v"]}, {"type": "lora", "rank": 4, "targets": ["to_q"]},
         "its layers are not those of tuner.train, targets, freeze_depth and dora; only it has "
         "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_v.lora_A.weight"),
        ({"type": "lora", "rank": 4}, {"type": "lora", "rank": 4, "dora": True},
         "its layers are not those of tuner.train, targets, freeze_depth and dora; it has not "
         "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k.lora_magnitude_vector.weight"),
    ],
)  # fmt: skip
def test_an_adapter_that_does_not_fit_is_refused(
    family: DiffusionFamily, tmp_path: Path, first: dict[str, object], then: dict[str, object], message: str
) -> None:
    learned(family, tmp_path, **first)
    with pytest.raises(UserError) as caught:
        tuner_of(family, init="dog@v1", **then).apply(load(family), 0, tmp_path)
    assert str(caught.value) == f"tuner.init: dog@v1: {message}"


@pytest.mark.parametrize("tuner", [{"type": "full"}, LORA])
def test_an_adapter_of_more_parts_is_refused(
    family: DiffusionFamily, tmp_path: Path, tuner: dict[str, object]
) -> None:
    learned(family, tmp_path, **{**tuner, "train": ["unet", "text_encoder"]})
    with pytest.raises(UserError) as caught:
        tuner_of(family, **{**tuner, "train": None}, init="dog").apply(load(family), 0, tmp_path)
    assert str(caught.value) == f"tuner.init: dog: {tmp_path}: it is for text_encoder too; the parts given are unet"


def test_listed_endings_are_looked_for_in_all_trained_parts(family: DiffusionFamily) -> None:
    parts = load(family, "unet", "text_encoder")
    both = ["unet", "text_encoder"]
    chosen = tuner_of(family, type="lora", rank=2, train=both, targets=["to_q", "q_proj"]).apply(parts, 0)
    assert {name.split(".")[0] + name.split(".lora_")[0].rpartition(".")[2] for name in chosen} == {
        "unetto_q", "text_encoderq_proj"}  # fmt: skip
    with pytest.raises(UserError, match=r"^tuner\.targets: 'to_z': no linear"):
        tuner_of(family, type="lora", train=both, targets=["to_q", "to_z"]).apply(load(family, *both), 0)


@pytest.mark.parametrize(
    ("tuner", "trained"),
    [
        ({"type": "full"}, {"unet"}),
        ({"type": "full", "train": ["text_encoder"]}, {"text_encoder"}),
        ({"type": "freeze", "freeze_depth": 8}, {"unet"}),
        ({"type": "freeze", "freeze_depth": 4, "only": ["norm"]}, {"unet"}),
        (LORA, {"unet", "text_encoder"}),
    ],
)
def test_in_bf16_what_moves_is_fp32_and_unrounded(
    family: DiffusionFamily, tuner: dict[str, object], trained: set[str]
) -> None:
    recipe = parse_recipe({"model": {"source": str(family.folder)}, "data": {"source": "s3://b"}, "tuner": tuner})
    trainee = assemble(recipe, "bf16")
    (player,) = trainee.players.values()
    place(player, trainee.dtype, "cpu")
    assert {name.partition(".")[0] for name in trainee.parameters} == trained
    assert {parameter.dtype for parameter in trainee.parameters.values()} == {torch.float32}
    frozen = [p for p in player.parameters() if not p.requires_grad]
    assert {p.dtype for p in frozen} == ({torch.bfloat16} if frozen else set())
    if tuner["type"] != "lora":
        stored = {part: family.load(part).state_dict() for part in trained}
        for name, parameter in trainee.parameters.items():
            part, _, own = name.partition(".")
            assert torch.equal(parameter, stored[part][own])
    batch = batch_of(family)
    if "text_encoder" not in trained:
        batch = cached(family, batch)
    outputs = set()
    player.get_submodule("main.conv_in").register_forward_hook(lambda m, i, output: outputs.add(output.dtype))
    total = player(batch).total
    total.backward()
    assert outputs == {torch.bfloat16} and total.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trainee.parameters.values())
    whole = assemble(recipe, "fp32")
    assert total.item() == pytest.approx(whole.players["denoiser"](batch).total.item(), rel=0.02)


def cached(family: DiffusionFamily, batch: Batch) -> Batch:
    """The batch with embeddings for its tokens."""
    tokens = {"input_ids": batch.tensors["token.input_ids"]}
    with torch.no_grad():
        states = family.encode_tokens({"text_encoder": family.load("text_encoder")}, tokens)["encoder_hidden_states"]
    kept = {name: value for name, value in batch.tensors.items() if not name.startswith("token.")}
    return Batch({**kept, "condition.encoder_hidden_states": states}, batch.weight)
