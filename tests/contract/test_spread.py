"""Text encoders in pieces encode as whole ones do."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from gtl.data.spread import spread
from gtl.families import open_family
from tests.contract.test_families import MODELS

PROMPTS = ["a dog", "a red car in the rain", ""]


def in_pieces(encoder: nn.Module, folder: Path) -> nn.Module:
    """Its first layers in memory, the last on disk; a machine with GPUs has more places for them."""
    most = int(sum(parameter.nbytes for parameter in encoder.parameters()) * 0.95)
    whole = encoder._no_split_modules
    made = spread(encoder, {"cpu": most, "disk": 2**40}, offload_dir=str(folder))
    places = made.hf_device_map
    assert set(places.values()) == {"cpu", "disk"}
    layers = {name for name, module in made.named_modules() if type(module).__name__ in whole}
    assert layers and not any(place.startswith(f"{name}.") for place in places for name in layers), "a layer was cut"
    return made


@pytest.mark.parametrize("model", ["sdxl", "flux-dev", "flux2", "flux2_klein", "qwen_image", "z_image", "sana"])
def test_an_encoder_in_pieces_encodes_the_same(tmp_path: Path, written: Callable[[str], Path], model: str) -> None:
    assert model in MODELS
    family = open_family(str(written(model)))
    whole = {name: family.load(name) for name in family.encoders}
    pieces = {name: in_pieces(family.load(name), tmp_path / name) for name in family.encoders}
    with torch.inference_mode():
        expected, found = (family.encode_prompts(encoders, PROMPTS) for encoders in (whole, pieces))
    for one, other in zip(expected, found, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in one.items())
