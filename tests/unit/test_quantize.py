"""A quantised base: how far it is from the whole one, what trains over it, and who may not have it."""

import sys
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gtl.config import Recipe, parse_recipe
from gtl.config.load import dump_recipe, read_yaml
from gtl.config.pairs import PAIRS
from gtl.families import open_family
from gtl.train.assemble import assemble
from gtl.train.place import place
from gtl.train.quantize import FORMATS, QuantizedLinear, quantize
from gtl.tuners.depth import is_under
from gtl.types import UserError

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The data type's values: QLoRA (arXiv 2305.14314), appendix E."""
SHAPES = [(64, 128), (5, 7), (33, 40), (1, 2), (1, 1), (640, 17)]
"""Some end within a block of shared scale, some within a byte of two codes."""


def make_recipe(kind: str | None, **tuner: Any) -> Recipe:
    return parse_recipe({
        "model": {"source": "builtin:tiny", "quantization": kind},
        "data": {"source": "photos", "resolution": 64},
        "tuner": {"rank": 4, "targets": "all-linear", **tuner},
        "objective": {"caption_dropout": 0},
    })


def quantized(layer: nn.Linear, kind: str, dtype: torch.dtype = torch.float32) -> QuantizedLinear:
    """The layer in a few bits a weight, ready to run."""
    made = QuantizedLinear(layer.requires_grad_(False), kind, dtype)
    place(made, dtype, "cpu")
    return made


def half_steps(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The farthest that the nearest value of the format can be from each weight, and the scale."""
    block, flat = FORMATS[kind].block, weight.float().flatten()
    scale = F.pad(flat, (0, -len(flat) % block)).view(-1, block).abs().amax(1)
    scale = scale.repeat_interleave(block)[: len(flat)].view(weight.shape)
    if kind == "int8":  # 127 even steps
        return scale / 254, scale
    if kind == "nf4":
        values = torch.tensor(NF4)
        above = torch.bucketize(weight.float() / scale, values).clamp(1, 15)
        return scale * (values[above] - values[above - 1]) / 2, scale
    # E4M3: three bits of mantissa below powers of two down to 2^-6, and even steps of 2^-9 below that.
    share = (weight.float() / scale).abs() * 448
    return scale / 448 * torch.exp2(share.log2().floor().clamp(min=-6) - 3) / 2, scale


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_weight_is_rounded_to_the_nearest_of_its_format(kind: str, source: torch.dtype) -> None:
    for seed, (rows, columns) in enumerate(SHAPES):
        torch.manual_seed(seed)
        layer = nn.Linear(columns, rows, dtype=source)
        weight = nn.init.normal_(layer.weight.detach(), std=0.02).clone()
        layer = quantized(layer, kind)
        assert layer.codes.nbytes + layer.scales.nbytes == FORMATS[kind].nbytes(weight.numel())
        steps, scale = half_steps(weight, kind)
        # On CPUs the 8-bit kernels look a weight up to 2^-15 of the scale.
        assert ((layer.weight - weight.float()).abs() <= steps + 2**-15 * scale + 1e-9).all()


@pytest.mark.parametrize("kind", FORMATS)
def test_zeros_stay_zeros(kind: str) -> None:
    layer = nn.Linear(40, 8)
    nn.init.zeros_(layer.weight)
    assert not quantized(layer, kind).weight.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_layer_runs_and_is_differentiated_as_the_whole_one(kind: str, dtype: torch.dtype) -> None:
    layer = quantized(nn.Linear(48, 33), kind, dtype)
    hidden = torch.randn(2, 5, 48, requires_grad=True)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            found = layer(hidden)
        expected = F.linear(hidden, layer.weight, layer.bias)
    assert {id(tensor) for tensor in kept} == {id(layer.codes), id(layer.scales)}
    assert found.dtype == expected.dtype == dtype
    assert torch.equal(found, expected)
    gradients = [torch.autograd.grad(output.float().square().sum(), hidden)[0] for output in (found, expected)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-6)


def test_nothing_that_casts_a_model_rounds_the_scales() -> None:
    layer = quantized(nn.Linear(48, 33), "int8")
    before = layer.weight
    assert torch.equal(layer.to(torch.bfloat16).weight, before)


def test_only_frozen_linear_layers_in_blocks_are_quantised() -> None:
    trainee = assemble(make_recipe("nf4", freeze_depth=0.5), "bf16")
    main = trainee.parts[trainee.family.main]
    prefixes = tuple(name for names in trainee.family.blocks(main) for name in names)
    whole = assemble(make_recipe(None, freeze_depth=0.5), "bf16").parts[trainee.family.main]
    inside = {
        name for name, layer in whole.named_modules()
        if isinstance(layer, nn.Linear) and not layer.weight.requires_grad and is_under(name, prefixes)
    }  # fmt: skip
    found = {name for name, layer in main.named_modules() if isinstance(layer, QuantizedLinear)}
    assert found == inside
    assert any(name.endswith(".base_layer") for name in found)
    assert any(not name.endswith(".base_layer") for name in found)  # in front of the freeze depth
    others = {n: p for n, p in main.named_parameters() if not n.endswith((".codes", ".scales"))}
    assert all(torch.equal(p, whole.get_parameter(n)) for n, p in others.items())
    place(main, trainee.dtype, "cpu")
    assert {p.dtype for p in others.values() if not p.requires_grad} == {torch.bfloat16}
    for name in found:
        numel, block = whole.get_submodule(name).weight.numel(), FORMATS["nf4"].block
        scales = main.get_parameter(f"{name}.scales").view(torch.float32)
        weight = F.pad(whole.get_submodule(name).weight.flatten(), (0, -numel % block))
        assert torch.equal(scales, weight.view(-1, block).abs().amax(1))


def test_nothing_is_rounded_before_it_is_placed_and_then_nothing_else_is_kept() -> None:
    blocks = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))).requires_grad_(False)
    main, given = nn.ModuleDict({"blocks": blocks}), torch.ones(1, 8)
    whole = [weakref.ref(layer.weight) for layer in blocks]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gtl.train.quantize.encode", None)
        quantize(main, ["blocks"], "nf4", torch.float32)
    with pytest.raises(RuntimeError, match="stride"):
        blocks(given)
    assert all(weight() is not None for weight in whole)
    place(main, torch.float32, "cpu")
    assert blocks(given).isfinite().all()
    assert all(weight() is None for weight in whole)


@pytest.mark.parametrize(("tuner", "objective"), PAIRS)
def test_what_moves_the_base_is_refused(tuner: str, objective: str) -> None:
    needed: dict[str, dict[str, Any]] = {
        "freeze": {"freeze_depth": 1}, "prompt": {"token": "<dog>", "initializer": "dog"},
        "distill": {"teacher": "builtin:tiny"}, "align": {"target": "builtin:scenes"},
    }  # fmt: skip
    values = {
        "model": {"source": "builtin:tiny", "quantization": "int8"},
        "data": {"source": [{"source": "photos"}, {"source": "builtin:scenes"}]},
        "tuner": {"type": tuner, **needed.get(tuner, {})},
        "objective": {"type": objective, **needed.get(objective, {})},
    }
    if PAIRS[tuner, objective].frozen_base:
        parse_recipe(values)
        return
    with pytest.raises(UserError) as refused:
        parse_recipe(values)
    assert str(refused.value) == (
        f"model.quantization: 'int8': {tuner} moves the model's own weights, which have to be whole for that; "
        "take tuner.type: lora, or null"
    )


def test_another_kind_is_refused() -> None:
    with pytest.raises(UserError, match=r"^model\.quantization: 'int4'.*nf4.*int8.*fp8") as refused:
        make_recipe("int4")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", FORMATS)
def test_it_needs_a_library(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError) as refused:
        assemble(make_recipe(kind), "fp32")
    assert str(refused.value) == (
        f"model.quantization: {kind!r} needs bitsandbytes, which is not installed: pip install 'gtl[quantized]', "
        "or set it to null"
    )


def test_a_recipe_keeps_it_and_none_has_it_unasked() -> None:
    recipe = make_recipe("nf4")
    assert parse_recipe(read_yaml(dump_recipe(recipe))) == recipe
    unasked = parse_recipe({"model": {"source": "builtin:tiny"}, "data": {"source": "photos"}})
    assert unasked.model.quantization is None
    family = open_family("builtin:tiny")
    assert not any(isinstance(m, QuantizedLinear) for m in assemble(unasked, "fp32").parts[family.main].modules())
