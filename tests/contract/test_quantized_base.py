"""Adapters over a quantised base: the same ones, and they learn as over the weights that it stands for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gtl.config import Recipe, parse_recipe
from gtl.train.assemble import Trainee, assemble
from gtl.train.place import place
from gtl.train.quantize import FORMATS, QuantizedLinear
from tests.contract.test_pairs import FALLS_TO, fixed_batch, overfit

LORAS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"dora": True},
    "pissa": {"initialization": "pissa"},
    "olora": {"initialization": "olora"},
}


def make_recipe(folder: Path, kind: str | None, **tuner: Any) -> Recipe:
    return parse_recipe(
        {
            "model": {"source": str(folder), "quantization": kind},
            "data": {"source": "photos"},
            "tuner": {"rank": 4, "targets": "all-linear", **tuner},
        }
    )


def placed(recipe: Recipe) -> Trainee:
    """What a worker trains, on the CPU."""
    trainee = assemble(recipe, "fp32")
    for player in trainee.players.values():
        place(player, trainee.dtype, "cpu")
    return trainee


def with_whole_weights(trainee: Trainee) -> None:
    """Put layers with the weights that the codes stand for in the place of quantised ones."""
    main = trainee.parts[trainee.family.main]
    for name, layer in list(main.named_modules()):
        if isinstance(layer, QuantizedLinear):
            whole = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None).requires_grad_(False)
            whole.weight.data, whole.bias = layer.weight, layer.bias
            main.set_submodule(name, whole)


@pytest.mark.parametrize("tuner", LORAS)
@pytest.mark.parametrize("kind", FORMATS)
def test_adapters_learn_over_it_as_over_the_weights_it_stands_for(
    written: Callable[[str], Path], kind: str, tuner: str
) -> None:
    folder = written("sd")
    recipe = make_recipe(folder, kind, **LORAS[tuner])
    trainee, plain = placed(recipe), placed(make_recipe(folder, None, **LORAS[tuner]))
    assert list(trainee.parameters) == list(plain.parameters)
    # What an adapter starts from is taken of the whole weights.
    assert all(torch.equal(plain.parameters[key], value) for key, value in trainee.parameters.items())
    for value in trainee.parameters.values():  # B starts at zero, and A has no gradient then
        torch.nn.init.normal_(value, std=0.05) if value.ndim == 2 else None
    batch = fixed_batch(trainee.family, recipe)
    (player,) = trainee.players.values()

    def gradient() -> Tensor:
        for value in trainee.parameters.values():
            value.grad = None
        player(batch).total.backward()
        return torch.cat([value.grad.flatten() for value in trainee.parameters.values() if value.grad is not None])

    found = gradient()
    with_whole_weights(trainee)
    expected = gradient()
    assert expected.norm() > 0
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("kind", FORMATS)
def test_it_overfits_one_batch(written: Callable[[str], Path], kind: str) -> None:
    folder = written("sd")
    recipe = make_recipe(folder, kind, alpha=8)
    trainee = placed(recipe)
    (player,) = trainee.players.values()
    batch = fixed_batch(trainee.family, recipe)
    losses = overfit(player, list(trainee.parameters.values()), batch, steps=30)
    assert losses[-1] < FALLS_TO * losses[0]
