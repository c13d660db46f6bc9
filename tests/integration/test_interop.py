"""What gtl draws and what plain diffusers draws with the same files and the same seed, as 8-bit pictures."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gtl.adapters import Card, Registry
from gtl.adapters.card import base_of
from gtl.adapters.commands import export_pipeline
from gtl.adapters.formats import LoraExport, write_lora
from gtl.families import open_family
from gtl.generate.command import run
from tests.tiny import make_sd, make_sdxl

SAME = 0.1 / 255
"""Mean absolute difference of pixels in [0, 1]. Measured: 0, or one level in one channel of one pixel (3e-7)."""
DIFFERENT = 5 / 255
PROMPT, NEGATIVE, SEED, STEPS, GUIDANCE = "a photo of a dog", "blurry", 12, 6, 5.0

KINDS = {
    "alpha-is-not-rank": ("unet", ("to_q", "to_k", "to_v", "to_out.0"), LoraExport(rank=4, alpha=10)),
    "rslora": ("unet", ("to_q", "to_k", "to_v", "to_out.0"), LoraExport(rank=4, alpha=6, rslora=True)),
    "conv": ("unet", ("conv1", "conv2", "ff.net.2"), LoraExport(rank=4, alpha=2)),
    "dora": ("unet", ("to_v", "to_out.0"), LoraExport(rank=4, alpha=8, dora=True)),
    "text-encoder": ("text_encoder", ("q_proj", "v_proj", "fc1"), LoraExport(rank=4, alpha=16)),
}


@pytest.fixture(scope="module")
def sd(tmp_path_factory) -> Path:
    return make_sd(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def family(sd):
    return open_family(str(sd))


@pytest.fixture(scope="module")
def registry(sd, family, tmp_path_factory) -> Registry:
    """One adapter of each kind, with random weights that are not zero."""
    opened = Registry(tmp_path_factory.mktemp("registry"))
    for seed, (name, (part, endings, config)) in enumerate(KINDS.items()):
        folder = tmp_path_factory.mktemp(name)
        write_lora(random_lora(family.load(part), part, endings, config, seed), folder, config=config)
        opened.publish(name, "v1", folder, Card(name=name, version="v1", base=base_of(family, str(sd)), tuner={}))
    return opened


@pytest.fixture
def pipeline(sd):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(sd)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def base(sd, tmp_path_factory) -> np.ndarray:
    """The base model's picture, drawn by gtl."""
    return ours(tmp_path_factory.mktemp("base"), model=str(sd))


def random_lora(part, name: str, endings: tuple[str, ...], config: LoraExport, seed: int) -> Mapping[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, layer in part.named_modules():
        if not module.endswith(tuple(f".{ending}" for ending in endings)):
            continue
        weight = layer.weight
        key, rank, window = f"{name}.{module}", config.rank, weight.shape[2:]
        tensors[f"{key}.lora_A.weight"] = torch.randn(rank, weight.shape[1], *window, generator=rng) * 0.2
        tensors[f"{key}.lora_B.weight"] = torch.randn(weight.shape[0], rank, *(1 for _ in window), generator=rng) * 0.2
        if config.dora:
            norm = weight.flatten(1).norm(dim=1)
            tensors[f"{key}.lora_magnitude_vector.weight"] = norm * (0.5 + torch.rand(len(norm), generator=rng))
    assert tensors
    return tensors


def ours(out: Path, negative: str = NEGATIVE, **options) -> np.ndarray:
    (path,) = run(
        out=out, prompt=PROMPT, negative_prompt=negative, seed=SEED, steps=STEPS, guidance=GUIDANCE, **options
    )
    return pixels(Image.open(path))


def theirs(pipeline, negative: str | None = NEGATIVE) -> np.ndarray:
    generator = torch.Generator().manual_seed(SEED)
    images = pipeline(
        PROMPT, negative_prompt=negative, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generator
    ).images
    return pixels(images[0])


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float64) / 255


def distance(one: np.ndarray, other: np.ndarray) -> float:
    assert one.shape == other.shape == (64, 64, 3)
    return float(np.abs(one - other).mean())


def test_base_picture_equals_plain_diffusers(base, pipeline):
    assert distance(base, theirs(pipeline)) < SAME


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_picture_equals_plain_diffusers(kind, registry, base, pipeline, tmp_path):
    picture = ours(tmp_path, adapters=[kind], registry=registry.store.root)
    pipeline.load_lora_weights(registry.fetch(kind))
    assert distance(picture, theirs(pipeline)) < SAME
    assert distance(picture, base) > DIFFERENT


def test_scaled_adapter_equals_plain_diffusers(registry, base, pipeline, tmp_path):
    picture = ours(tmp_path, adapters=["alpha-is-not-rank:0.3"], registry=registry.store.root)
    pipeline.load_lora_weights(registry.fetch("alpha-is-not-rank"), adapter_name="one")
    full = theirs(pipeline)
    pipeline.set_adapters(["one"], [0.3])
    assert distance(picture, theirs(pipeline)) < SAME
    assert min(distance(picture, base), distance(picture, full)) > DIFFERENT


def test_two_adapters_equal_plain_diffusers(registry, base, pipeline, tmp_path):
    scales = {"rslora": 0.7, "conv": -0.5}
    adapters = [f"{name}@v1:{scale}" for name, scale in scales.items()]
    picture = ours(tmp_path / "both", adapters=adapters, registry=registry.store.root)
    for name in scales:
        pipeline.load_lora_weights(registry.fetch(name), adapter_name=name)
    pipeline.set_adapters(list(scales), list(scales.values()))
    assert distance(picture, theirs(pipeline)) < SAME
    alone = [ours(tmp_path / each[:4], adapters=[each], registry=registry.store.root) for each in adapters]
    assert min(distance(picture, other) for other in (base, *alone)) > DIFFERENT


XL_LORA = LoraExport(rank=4, alpha=10)
XL_ENDINGS = {
    "unet": ("to_q", "to_k", "to_v", "to_out.0"),
    "text_encoder": ("q_proj", "v_proj", "out_proj", "fc1"),
    "text_encoder_2": ("q_proj", "v_proj", "out_proj", "fc1"),
}


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory) -> Path:
    return make_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def registry_xl(sdxl, tmp_path_factory) -> Registry:
    """An adapter on each trained part, and one on all of them."""
    family = open_family(str(sdxl))
    opened = Registry(tmp_path_factory.mktemp("registry"))
    each = {
        part: random_lora(family.load(part), part, endings, XL_LORA, seed)
        for seed, (part, endings) in enumerate(XL_ENDINGS.items())
    }
    for name, chosen in {**{part: [part] for part in each}, "all": list(each)}.items():
        folder = tmp_path_factory.mktemp(name)
        write_lora({key: value for part in chosen for key, value in each[part].items()}, folder, config=XL_LORA)
        opened.publish(name, "v1", folder, Card(name=name, version="v1", base=base_of(family, str(sdxl)), tuner={}))
    return opened


@pytest.mark.parametrize("negative", ["", NEGATIVE])
@pytest.mark.parametrize("kind", [None, *XL_ENDINGS, "all"])
def test_sdxl_picture_equals_plain_diffusers(kind, negative, registry_xl, sdxl, tmp_path):
    """Without a negative prompt the pipeline leads away from zeros, and so does gtl."""
    from diffusers import StableDiffusionXLPipeline

    base = ours(tmp_path / "base", negative, model=str(sdxl))
    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl)
    pipeline.set_progress_bar_config(disable=True)
    picture = base
    if kind is not None:
        picture = ours(tmp_path / "adapted", negative, adapters=[kind], registry=registry_xl.store.root)
        pipeline.load_lora_weights(registry_xl.fetch(kind))
        # One layer of the first encoder's two is read, so it moves the least.
        assert distance(picture, base) > 10 * SAME
    assert distance(picture, theirs(pipeline, negative or None)) < SAME


def test_sdxl_exported_with_its_adapter_is_a_pipeline(registry_xl, sdxl, tmp_path):
    from diffusers import StableDiffusionXLPipeline

    export_pipeline(registry_xl.store.root, "all", tmp_path / "merged")
    pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path / "merged")
    pipeline.set_progress_bar_config(disable=True)
    picture = ours(tmp_path / "adapted", "", adapters=["all"], registry=registry_xl.store.root)
    assert distance(picture, theirs(pipeline, None)) < SAME
