"""A classifier that has learned nothing yet: a network that sees, as it is, under heads with random weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gtl.families.classifier import BACKBONES, see, without_pooler
from gtl.families.files import INDEX, read_json
from gtl.families.loading import write_weights
from gtl.imports import absent, quieted
from gtl.types import Task, UserError

if TYPE_CHECKING:
    from torch import nn

PIXELS, SCENES = "builtin:pixels", "builtin:backbone"
SIDE = 64
"""Of pictures that `builtin:pixels` looks at."""


def write_classifier(source: str, tasks: Mapping[str, Task], folder: Path, seed: int = 0) -> None:
    """Write a network with heads; the index comes last.

    Args:
        source: `builtin:backbone`, `builtin:pixels`, a folder or hub id of a ResNet, ViT or DINOv2 of transformers, or
            the folder of another classifier, whose heads are left behind.
        tasks: By name; one head each.
        folder: Where to.
        seed: Of the heads' weights.

    Raises:
        UserError: there is no such network, or it is of another kind.
    """
    if (Path(source) / INDEX).is_file():
        shutil.copytree(Path(source) / "backbone", folder / "backbone")
        kind = read_json(Path(source) / INDEX)["backbone"][1]
        stored = read_json(Path(source) / "head" / "config.json")
        sizes = {key: stored[key] for key in ("pooled", "channels", "stride")}
    else:
        network, config, sight = open_network(source)
        kind, sizes = type(network).__name__, sizes_of(network, sight["side"])
        write_weights(network, folder / "backbone")
        write_json(folder / "backbone" / "config.json", {**config, "sight": sight})
    write_head(tasks, sizes, folder, seed)
    index = {"_class_name": "ClassifierPipeline", "backbone": [BACKBONES[kind], kind], "head": ["gtl", "Heads"]}
    write_json(folder / INDEX, index)


def write_head(tasks: Mapping[str, Task], sizes: Mapping[str, int], folder: Path, seed: int) -> None:
    """Write heads with random weights."""
    import torch

    from gtl.families.sight import Heads

    told = {
        name: {"column": task.column, "kind": task.kind, "values": list(task.values)} for name, task in tasks.items()
    }
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        head = Heads(told, **sizes)
    write_weights(head, folder / "head")
    write_json(folder / "head" / "config.json", {"tasks": told, **sizes})


def open_network(source: str) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """The network, its config, and what its pictures are like (see `gtl.families.classifier`).

    Raises:
        UserError: there is no such network, or it is of another kind.
    """
    from gtl.families.sight import Pixels, Scenes

    if source == PIXELS:
        return Pixels(), {"side": Pixels().side}, {"side": SIDE, "mean": [0.5] * 3, "std": [0.5] * 3}
    from gtl.backbones import open_backbone
    from gtl.backbones.extractor import Extractor
    from gtl.backbones.pretrained import Vision

    opened = open_backbone(source)
    assert isinstance(opened, Extractor)
    if source == SCENES:
        config = {key: opened.config[key] for key in ("widths", "squeezed", "dimensions")}
        scenes = Scenes(**config)
        tensors = {f"network.{name}": value for name, value in opened.network.state_dict().items()}
        scenes.load_state_dict({name: tensors[name] for name in scenes.state_dict()})
        return scenes, config, {"side": SIDE, "mean": [128 / 255] * 3, "std": [128 / 255] * 3}
    model: Any = opened.network.model if isinstance(opened.network, Vision) else opened.network
    if type(model).__name__ not in BACKBONES:
        known = ", ".join(name.removesuffix("Model") for name, library in BACKBONES.items() if library != "gtl")
        raise UserError(f"{source}: a {type(model).__name__}; heads stand on {known}, {SCENES} and {PIXELS}")
    return without_pooler(model), dict(opened.config["network"]), sight_of(opened.config["preprocessing"], source)


def sight_of(settings: Mapping[str, Any], source: str) -> dict[str, Any]:
    """From the settings of a preprocessor of transformers.

    Raises:
        UserError: they say no size.
    """
    size = settings.get("crop_size") if settings.get("do_center_crop") else settings.get("size")
    sides = [int(side) for side in (size or {}).values() if side]
    if not sides:
        raise UserError(f"{source}: preprocessor_config.json says no size of pictures")
    normalizes = settings.get("do_normalize")
    mean, std = ([float(n) for n in settings[key]] if normalizes else [plain] * 3
                 for key, plain in (("image_mean", 0.0), ("image_std", 1.0)))  # fmt: skip
    return {"side": min(sides), "mean": mean, "std": std}


def sizes_of(network: nn.Module, side: int) -> dict[str, int]:
    """Of the features that a network makes of a picture: what heads have to know."""
    import torch

    with torch.no_grad():
        found = see(network.eval(), torch.zeros(1, 3, side, side))
    stride = side // found["map"].shape[-1]
    return {"pooled": found["pooled"].shape[1], "channels": found["map"].shape[1], "stride": stride}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """With a line for every key."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, default=str) + "\n", encoding="utf-8")


def write_diffusion_classifier(
    source: str, tasks: Mapping[str, Task], folder: Path, time: float, block: float, seed: int = 0
) -> None:  # fmt: skip
    """Write a diffusion model with heads on what it makes of a picture; the index comes last.

    Args:
        source: A hub id, a local folder in diffusers layout, or a bucket URL of one.
        tasks: By name; one head each.
        folder: Where to.
        time: Share of the way from a picture to noise, from 0 to 1, at which it is looked at.
        block: Behind which of the residual blocks of its UNet, as a share of them from 0 to 1.
        seed: Of the heads' weights.

    Raises:
        UserError: it is no diffusion model, or has no UNet.
    """
    from gtl.families import denoising, open_family
    from gtl.families.diffusion_classifier import BASE, FEATURES, Midway

    family = denoising(open_family(source))
    if not 0 <= time <= 1 or not 0 <= block <= 1:
        raise UserError(f"--time {time:g} --block {block:g}: expected shares from 0 to 1")
    main, codec = family.load(family.main), family.load(family.codec) if family.codec else None
    names = [prefixes[0] for prefixes in family.blocks(main) if ".resnets." in prefixes[0]]
    if not names:
        raise UserError(f"{source}: {family.name} has no UNet, whose blocks make maps of places; heads stand on those")
    family.export({}, folder)
    told = {"time": time, "block": names[min(int(block * len(names)), len(names) - 1)]}
    write_json(folder / FEATURES, told)
    index = read_json(folder / INDEX)
    (folder / INDEX).unlink()
    encoders = {name: family.load(name) for name in family.encoders}
    conditions = family.encode_prompts(encoders, [""])[0] if encoders else {}
    midway = Midway(family, main, codec, told, conditions).float().eval()
    write_head(tasks, sizes_of(midway, family.default_size[0]), folder, seed)
    index |= {"_class_name": "DiffusionClassifierPipeline", BASE: index["_class_name"], "head": ["gtl", "Heads"]}
    write_json(folder / INDEX, index)


def write_text_classifier(source: str, part: str, tasks: Mapping[str, Task], folder: Path, seed: int = 0) -> None:
    """Write a text encoder of a diffusion model, alone, with heads on what it makes of captions; the index comes last.

    Args:
        source: A hub id, a local folder in diffusers layout, or a bucket URL of one.
        part: Which of its text encoders.
        tasks: By name; one head each.
        folder: Where to.
        seed: Of the heads' weights.

    Raises:
        UserError: it is no diffusion model, has no such encoder, or a task is of places in pictures.
    """
    import torch

    from gtl.families import denoising, open_family
    from gtl.families.text_classifier import READERS, pooled

    if boxed := next((name for name, task in tasks.items() if task.kind == "boxes"), None):
        raise UserError(f"--task {boxed}: boxes are places in pictures, and a text encoder reads texts; leave it out")
    family: Any = denoising(open_family(source))
    if part not in family.encoders:
        known = f"has {', '.join(family.encoders)}" if family.encoders else "reads no text"
        raise UserError(f"--part {part}: {source}: no text encoder of that name; the model {known}")
    library, name = family.classes[part]
    if name not in READERS:
        raise UserError(f"--part {part}: {source}: a {name}; heads stand on {', '.join(READERS)}")
    tokens, encoder = family.companions[part], family.load(part)
    with absent("deepspeed"), quieted():  # accelerate would import it, and it warns where there is no GPU
        encoder.save_pretrained(folder / "backbone")
    shutil.copytree(family.folder / tokens, folder / "tokenizer")
    with torch.no_grad():
        width = pooled(encoder.float(), family.tokenizers[part], [""]).shape[1]
    write_head(tasks, {"pooled": width, "channels": 1, "stride": 1}, folder, seed)
    index = {
        "_class_name": "TextClassifierPipeline", "backbone": [library, name], "head": ["gtl", "Heads"],
        "tokenizer": family.index[tokens],
    }  # fmt: skip
    write_json(folder / INDEX, index)
