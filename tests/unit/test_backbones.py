"""Feature extractors: the network of FID, models of transformers and the built-in one, each against its own sources."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from gtl.backbones import open_backbone
from gtl.backbones.base import Backbone, TextBackbone
from gtl.backbones.extractor import Extractor, hash_weights, load_weights, square
from gtl.backbones.inception import BLOCKS, Block, Inception
from gtl.backbones.scenes import builtin_folder
from gtl.types import UserError
from tests.tiny import CLIP_PREPROCESSOR, SMALL, make_clip, write_json

PREPROCESSORS: dict[str, dict[str, Any]] = {  # in the words of the files on the hub
    "clip": CLIP_PREPROCESSOR,
    "dinov2": {
        "image_processor_type": "BitImageProcessor", "do_resize": True, "size": {"shortest_edge": 32}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": 28, "width": 28}, "do_convert_rgb": True, "do_rescale": True,
        "rescale_factor": 0.00392156862745098, "do_normalize": True, "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    },
    "vit": {
        "feature_extractor_type": "ViTFeatureExtractor", "do_resize": True, "size": 32, "resample": 2,
        "do_normalize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    },
}  # fmt: skip
RESIZES = {
    "clip": "bicubic to shortest edge 32, antialiased; centre crop 32 x 32; less the mean (0.48, 0.46, 0.41), by "
    "(0.27, 0.26, 0.28)",
    "dinov2": "bicubic to shortest edge 32, antialiased; centre crop 28 x 28; less the mean (0.485, 0.456, 0.406), by "
    "(0.229, 0.224, 0.225)",
    "vit": "bilinear to 32 x 32, antialiased; less the mean (0.5, 0.5, 0.5), by (0.5, 0.5, 0.5)",
}


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny models: clip, dinov2, vit, and classifier, whose file lacks the pooler as such files do."""
    import transformers as t

    folder = tmp_path_factory.mktemp("models")
    make_clip(folder / "clip")
    seen = {"image_size": 32, "patch_size": 8, **SMALL}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dinov2 = t.Dinov2Config(image_size=28, patch_size=7, mlp_ratio=2, **SMALL)
        t.Dinov2Model(dinov2).save_pretrained(folder / "dinov2")
        t.ViTModel(t.ViTConfig(**seen)).save_pretrained(folder / "vit")
        t.ViTForImageClassification(t.ViTConfig(**seen)).save_pretrained(folder / "classifier")
        t.BertModel(t.BertConfig(vocab_size=20, **SMALL)).save_pretrained(folder / "bert")
    for name, of in {"dinov2": "dinov2", "vit": "vit", "classifier": "vit", "bert": "vit"}.items():
        write_json(folder / name / "preprocessor_config.json", PREPROCESSORS[of])
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Inception network's state dict with random weights, as torch saves it."""
    lots = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        expected = Inception().state_dict()
    state = {}
    for name, tensor in expected.items():
        if tensor.dim() == 4:
            state[name] = torch.randn(tensor.shape, generator=lots) * (2 / tensor[0].numel()) ** 0.5
        elif tensor.is_floating_point():
            state[name] = torch.rand(tensor.shape, generator=lots) + 0.5
        else:
            state[name] = torch.tensor(0)
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(state, file)
    return file


@pytest.fixture(scope="module")
def inception(weights: Path) -> Extractor:
    return open_inception(weights)


def open_inception(file: Path) -> Extractor:
    opened = open_backbone(f"inception:{file}")
    assert isinstance(opened, Extractor)
    return opened


# Every backbone


@pytest.fixture(params=["builtin:backbone", "clip", "dinov2", "vit", "classifier"])
def backbone(request: pytest.FixtureRequest, models: Path) -> Any:
    return open_backbone(request.param if ":" in request.param else str(models / request.param))


def test_features_are_of_each_picture_alone_in_any_size_and_mode(backbone: Any) -> None:
    assert isinstance(backbone, Backbone)
    assert isinstance(backbone, TextBackbone) == backbone.name.endswith("clip")
    red = noise(40, 60)
    clear = red.convert("RGBA")
    clear.putalpha(0)
    pictures = [red, noise(30, 20), noise(70, 64, 1), red.convert("L"), clear, Image.new("RGB", (60, 40), "white")]
    features, logits = backbone(pictures)
    assert (features.shape, features.dtype, features.device.type) == ((6, backbone.dimensions), torch.float32, "cpu")
    assert not features.is_inference()
    for i, picture in enumerate(pictures):
        alone, _ = backbone([picture])
        torch.testing.assert_close(alone[0], features[i], atol=2e-5, rtol=1e-5)
    assert torch.equal(backbone(pictures)[0], features)
    grey, _ = backbone([red.convert("L").convert("RGB")])
    torch.testing.assert_close(grey[0], features[3], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(features[4], features[5], atol=2e-5, rtol=1e-5)  # what is transparent is white
    assert (features[0] - features[1]).abs().max() > 1e-3
    assert logits is None or len(logits) == 6


def test_more_pictures_than_one_pass_takes_come_back_in_order(backbone: Any) -> None:
    pictures = [noise(16, 16, seed) for seed in range(40)]
    features, _ = backbone(pictures)
    torch.testing.assert_close(features[33:], backbone(pictures[33:])[0], atol=2e-5, rtol=1e-5)


def test_a_fingerprint_is_of_weights_config_and_preprocessing(models: Path, tmp_path: Path) -> None:
    here = open_backbone(str(models / "dinov2")).fingerprint()
    copy = shutil.copytree(models / "dinov2", tmp_path / "copy")
    assert open_backbone(str(copy)).fingerprint() == here
    assert len(here) == 64
    write_json(copy / "preprocessor_config.json", {**PREPROCESSORS["dinov2"], "resample": 2})
    resized = open_backbone(str(copy)).fingerprint()
    write_json(copy / "preprocessor_config.json", PREPROCESSORS["dinov2"])
    config = json.loads((copy / "config.json").read_text())
    write_json(copy / "config.json", {**config, "layer_norm_eps": 1e-5})
    configured = open_backbone(str(copy)).fingerprint()
    write_json(copy / "config.json", config)
    tensors = load_file(copy / "model.safetensors")
    tensors["layernorm.bias"][0] += 1
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    moved = open_backbone(str(copy)).fingerprint()
    assert len({here, resized, configured, moved}) == 4


def test_no_pictures_are_a_mistake_of_the_caller(backbone: Any) -> None:
    with pytest.raises(ValueError, match="no images"):
        backbone([])


# transformers


@pytest.mark.parametrize("kind", RESIZES)
def test_what_is_done_to_pictures_is_said(models: Path, kind: str) -> None:
    opened = open_backbone(str(models / kind))
    assert (opened.name, opened.resize) == (str(models / kind), RESIZES[kind])
    assert opened.dimensions == (12 if kind == "clip" else 16)


def test_clip_compares_pictures_and_texts_as_transformers_does(models: Path) -> None:
    from transformers import AutoTokenizer, CLIPModel

    opened = open_backbone(str(models / "clip"))
    assert isinstance(opened, TextBackbone)
    texts = ["a red dog", "a photo of a very large brown horse", " ".join(["a cat and a dog"] * 40)]
    model = CLIPModel.from_pretrained(models / "clip").eval()
    tokens = AutoTokenizer.from_pretrained(models / "clip")(texts, truncation=True, padding=True, return_tensors="pt")
    assert tokens["input_ids"].shape[1] == 77
    pixels = torch.stack([by_hand(noise(32, 32, seed)) for seed in range(2)])  # no resize: of its size already
    with torch.inference_mode():
        expected = model(**tokens, pixel_values=pixels)
    pictures, _ = opened([noise(32, 32, seed) for seed in range(2)])
    torch.testing.assert_close(pictures, expected.image_embeds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(opened.encode_texts(texts), expected.text_embeds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(opened.encode_texts(texts[:1]), expected.text_embeds[:1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pictures.norm(dim=1), torch.ones(2))
    with pytest.raises(ValueError, match="no texts"):
        opened.encode_texts([])


def by_hand(image: Image.Image) -> Tensor:
    settings = PREPROCESSORS["clip"]
    mean, std = (torch.tensor(settings[f"image_{name}"])[:, None, None] for name in ("mean", "std"))
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - mean) / std


def test_features_are_what_a_model_pools_or_its_class_token(models: Path) -> None:
    from transformers import Dinov2Model, ViTForImageClassification, ViTModel

    picture = noise(28, 28)
    for kind, model in {"dinov2": Dinov2Model, "vit": ViTModel, "classifier": ViTForImageClassification}.items():
        opened = open_backbone(str(models / kind))
        assert isinstance(opened, Extractor)
        loaded = model.from_pretrained(models / kind).eval()
        with torch.inference_mode():
            output = (loaded.vit if kind == "classifier" else loaded)(opened._prepare(picture)[None])
        expected = output.last_hidden_state[:, 0] if kind == "classifier" else output.pooler_output
        torch.testing.assert_close(opened([picture])[0], expected, atol=1e-5, rtol=1e-5)


# Inception


def test_inception_has_the_tensors_of_the_published_file() -> None:
    with torch.device("meta"):
        network = Inception()
    listing = "\n".join(f"{name} {list(tensor.shape)}" for name, tensor in sorted(network.state_dict().items()))
    # Of torch-fidelity's network, which loads the same file strictly.
    assert hashlib.sha256(listing.encode()).hexdigest()[:16] == "8cdd2faeb41211e1"
    assert sum(parameter.numel() for parameter in network.parameters()) == 23_850_960
    stored = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    assert 0 < 95_628_359 - stored < 100_000  # the file's length: the rest are names


def layer(
    state: dict[str, Tensor], name: str, x: Tensor, stride: int = 1, padding: int | tuple[int, int] = 0
) -> Tensor:
    """Convolution, batch norm by its formula, ReLU."""
    x = F.conv2d(x, state[f"{name}.conv.weight"], None, stride, padding)
    mean, var, scale, shift = (
        state[f"{name}.bn.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
    )
    return ((x - mean) / (var + 0.001).sqrt() * scale + shift).relu()


def mean_of_neighbours(x: Tensor) -> Tensor:
    """Of the pixels that are there, so that the border is no darker."""
    ones = torch.ones(1, 1, 3, 3)
    sums = F.conv2d(x.flatten(0, 1)[:, None], ones, padding=1).view_as(x)
    return sums / F.conv2d(torch.ones(1, 1, *x.shape[2:]), ones, padding=1)


def mixed_5b(s: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    triple = layer(s, "branch3x3dbl_2", layer(s, "branch3x3dbl_1", x), padding=1)
    return [
        layer(s, "branch1x1", x),
        layer(s, "branch5x5_2", layer(s, "branch5x5_1", x), padding=2),
        layer(s, "branch3x3dbl_3", triple, padding=1),
        layer(s, "branch_pool", mean_of_neighbours(x)),
    ]


def mixed_6a(s: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    double = layer(s, "branch3x3dbl_2", layer(s, "branch3x3dbl_1", x), padding=1)
    return [layer(s, "branch3x3", x, 2), layer(s, "branch3x3dbl_3", double, 2), F.max_pool2d(x, 3, 2)]


def mixed_6b(s: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    row, column = (0, 3), (3, 0)
    short = layer(s, "branch7x7_2", layer(s, "branch7x7_1", x), padding=row)
    long = layer(s, "branch7x7dbl_2", layer(s, "branch7x7dbl_1", x), padding=column)
    long = layer(s, "branch7x7dbl_4", layer(s, "branch7x7dbl_3", long, padding=row), padding=column)
    return [
        layer(s, "branch1x1", x),
        layer(s, "branch7x7_3", short, padding=column),
        layer(s, "branch7x7dbl_5", long, padding=row),
        layer(s, "branch_pool", mean_of_neighbours(x)),
    ]


def mixed_7a(s: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    long = layer(s, "branch7x7x3_2", layer(s, "branch7x7x3_1", x), padding=(0, 3))
    return [
        layer(s, "branch3x3_2", layer(s, "branch3x3_1", x), 2),
        layer(s, "branch7x7x3_4", layer(s, "branch7x7x3_3", long, padding=(3, 0)), 2),
        F.max_pool2d(x, 3, 2),
    ]


def mixed_7(s: dict[str, Tensor], x: Tensor, pooled: Tensor) -> list[Tensor]:
    single = layer(s, "branch3x3_1", x)
    double = layer(s, "branch3x3dbl_2", layer(s, "branch3x3dbl_1", x), padding=1)
    return [
        layer(s, "branch1x1", x),
        layer(s, "branch3x3_2a", single, padding=(0, 1)),
        layer(s, "branch3x3_2b", single, padding=(1, 0)),
        layer(s, "branch3x3dbl_3a", double, padding=(0, 1)),
        layer(s, "branch3x3dbl_3b", double, padding=(1, 0)),
        layer(s, "branch_pool", pooled),
    ]


COMPUTED: dict[str, Callable[[dict[str, Tensor], Tensor], list[Tensor]]] = {
    "Mixed_5b": mixed_5b,
    "Mixed_6a": mixed_6a,
    "Mixed_6b": mixed_6b,
    "Mixed_7a": mixed_7a,
    "Mixed_7b": lambda s, x: mixed_7(s, x, mean_of_neighbours(x)),
    "Mixed_7c": lambda s, x: mixed_7(s, x, F.max_pool2d(x, 3, 1, 1)),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_a_block_of_each_kind_computes_what_its_definition_says(inception: Extractor, name: str) -> None:
    block = inception.network.get_submodule(name)
    assert isinstance(block, Block)
    x = torch.randn(2, BLOCKS[name][0], 9, 8, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found, expected = block(x), torch.cat(COMPUTED[name](block.state_dict(), x), 1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_inception_gives_pooled_features_and_logits_without_bias(inception: Extractor, weights: Path) -> None:
    assert (inception.name, inception.dimensions) == ("inception", 2048)
    assert inception.resize == "bicubic to 299 x 299, antialiased, not rounded; (x - 128) / 128"
    features, logits = inception([noise(64, 64), noise(400, 300, 1)])
    assert logits is not None
    assert (features.shape, logits.shape) == ((2, 2048), (2, 1008))
    fc = torch.load(weights, weights_only=True)["fc.weight"]
    torch.testing.assert_close(logits, features @ fc.T)


def test_counters_of_batch_norm_may_be_missing(inception: Extractor) -> None:
    state = {k: v for k, v in inception.network.state_dict().items() if not k.endswith("num_batches_tracked")}
    with torch.device("meta"):
        network = Inception()
    load_weights(network, state, "w.pth")
    assert hash_weights(network, {}) == hash_weights(inception.network, {})


@pytest.mark.parametrize(("width", "height"), [(64, 64), (300, 200), (1024, 777), (299, 299)])
def test_the_resize_is_pillows_of_floats(width: int, height: int) -> None:
    image = noise(height, width)
    channels = [Image.fromarray(channel.astype(np.float32)) for channel in np.moveaxis(np.array(image), 2, 0)]
    expected = np.stack([np.array(c.resize((299, 299), Image.Resampling.BICUBIC)) for c in channels]).clip(0, 255)
    assert np.abs(square(image, 299).numpy() * 128 + 128 - expected).max() < 0.01


# Mistakes


def rewritten(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    def change_file(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return change_file


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:3000])


def narrow(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name][:-1].clone()


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (cut, "not readable as weights"),
        (lambda file: torch.save([1], file), "holds no weights by name"),
        (lambda file: torch.save(Image.new("L", (1, 1)), file), "not readable as weights"),  # a pickle that runs code
    ],
)
def test_a_wrong_inception_file_is_told(
    weights: Path, tmp_path: Path, break_it: Callable[[Path], object], message: str
) -> None:
    file = tmp_path / "weights.pth"
    shutil.copy(weights, file)
    break_it(file)
    with pytest.raises(UserError, match=message) as caught:
        open_inception(file)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("fc.bias"), "1 of 566 tensors are missing, the first is fc.bias"),
        (lambda t: t.update({"AuxLogits.fc.bias": t["fc.bias"]}), "1 tensors too many, the first is AuxLogits.fc.bias"),
        (lambda t: narrow(t, "fc.bias"), r"fc.bias has shape \[1007\]; the network's is \[1008\]"),
    ],
)
def test_other_weights_are_told(
    inception: Extractor, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    tensors = inception.network.state_dict()
    change(tensors)
    with torch.device("meta"):
        network = Inception()
    with pytest.raises(UserError, match=f"^w.pth: {message}"):
        load_weights(network, tensors, "w.pth")


@pytest.mark.parametrize(
    ("name", "break_it", "message"),
    [
        ("dinov2", lambda f: cut(f / "model.safetensors"), "not usable as a transformers model that sees"),
        ("dinov2", lambda f: (f / "model.safetensors").unlink(), "not usable as a transformers model that sees"),
        ("dinov2", lambda f: (f / "preprocessor_config.json").unlink(), "not usable as a transformers model that sees"),
        ("dinov2", lambda f: (f / "config.json").write_text("{"), "not usable as a transformers model that sees"),
        (
            "dinov2",
            rewritten(lambda t: t.pop("layernorm.bias")),
            "1 of the model's weights are missing, the first is layernorm.bias",
        ),
        (
            "dinov2",
            rewritten(lambda t: narrow(t, "layernorm.bias")),
            "layernorm.bias has another shape than config.json describes",
        ),
        ("clip", lambda f: (f / "vocab.json").unlink(), "not usable as a transformers model that sees"),
        ("bert", lambda f: None, "a BertModel, which does not see"),
    ],
)
def test_a_wrong_folder_is_told(
    models: Path, tmp_path: Path, name: str, break_it: Callable[[Path], object], message: str
) -> None:
    folder = shutil.copytree(models / name, tmp_path / name)
    break_it(folder)
    with pytest.raises(UserError, match=message) as caught:
        open_backbone(str(folder))
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("builtin:other", "builtin:other: no such built-in backbone; there is builtin:backbone"),
        ("inception:", "inception:: no file named; give the path of pt_inception-2015-12-05-6726825d.pth"),
        ("inception:/nowhere/w.pth", "inception:/nowhere/w.pth: no such file; give the path of pt_inception"),
        ("inception:/", "inception:/: a folder; give the path of"),
        ("./nowhere", "./nowhere: no such folder; a backbone is builtin:backbone, inception:FILE, or"),
        ("what is this", "what is this: no such folder; a backbone is builtin:backbone"),
        ("nobody/nothing", "nobody/nothing: neither a folder here nor, in the cache or on the hub, a transformers"),
    ],
)
def test_an_unknown_backbone_is_told(spec: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        open_backbone(spec)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_damaged_built_in_backbone_is_told(tmp_path: Path) -> None:
    from gtl.backbones.scenes import open_scenes

    folder = shutil.copytree(builtin_folder(), tmp_path / "backbone")
    cut(folder / "model.safetensors")
    with pytest.raises(UserError, match="backbone: damaged"):
        open_scenes(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="model.safetensors: missing; `make builtin` makes it"):
        open_scenes(folder)
