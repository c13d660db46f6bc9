"""Networks that see, with heads that say what is in a picture, in diffusers' layout.

A folder has a `model_index.json`, and for `backbone` and `head` a `config.json` and safetensors each; `gtl heads` makes
one. Under `sight` the backbone's config has the side of the pictures that it was made for and what they are normalised
by.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from gtl.families.files import INDEX
from gtl.families.layout import DiffusersLayout
from gtl.families.loading import write_weights
from gtl.types import Task, UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from gtl.families.base import Conditions

BACKBONES: dict[str, str] = {
    "Scenes": "gtl", "Pixels": "gtl",
    "ResNetModel": "transformers", "ViTModel": "transformers", "Dinov2Model": "transformers",
}  # fmt: skip
"""Classes of networks -> where they are from."""
STRIDE_32 = "ResNetModel"
"""Takes pictures of any size; the others have the one that they were made for."""
LISTS = ("network.stages", "encoder.stages", "encoder.layer", "encoder.layers", "layers")
"""Where networks have their blocks, or stages of them."""


class Classifier(DiffusersLayout):
    """A network that sees and its heads."""

    name: ClassVar[str] = "classifier"
    main: ClassVar[str] = "backbone"
    learns: ClassVar[tuple[str, ...]] = ("classify",)
    draws: ClassVar[Literal["by denoising", "at once", "nothing"]] = "nothing"
    codec: ClassVar[str | None] = "backbone"
    encoders: tuple[str, ...] = ()
    critics: tuple[str, ...] = ()
    heads: tuple[str, ...] = ("head",)
    learns_words: ClassVar[bool] = False
    scheduler_config: Mapping[str, Any] = {}  # type: ignore[assignment]  # there is no sampler

    def check_index(self) -> None:
        """Settle which networks the model has.

        Raises:
            UserError: one is of a class that is not known.
        """
        self.classes = {"backbone": self._class_of("backbone", BACKBONES), "head": self._class_of("head", HEAD)}

    def _class_of(self, part: str, known: Mapping[str, str]) -> tuple[str, str]:
        found = self.index.get(part)
        name = found[1] if isinstance(found, list) and len(found) == 2 else found
        if name not in known:
            raise UserError(f"{self.folder / INDEX}: {part}: {name}; expected {' or '.join(known)}")
        return known[str(name)], str(name)

    @functools.cached_property
    def tasks(self) -> Mapping[str, Task]:
        """What the head says, by name."""
        try:
            return {
                name: Task(task["column"], task["kind"], tuple(task["values"]))
                for name, task in self.config("head")["tasks"].items()
            }
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.folder / 'head' / 'config.json'}: not that of heads: {error!r}") from error

    @functools.cached_property
    def sight(self) -> dict[str, Any]:
        """`side` in pixels, and `mean` and `std` of each colour from 0 to 1."""
        found = self.config("backbone").get("sight")
        if not isinstance(found, dict) or {"side", "mean", "std"} - found.keys():
            raise UserError(f"{self.folder / 'backbone' / 'config.json'}: sight: expected side, mean and std")
        return found

    def build(self, part: str) -> nn.Module:
        """The part from its config, with whatever weights the surrounding device context gives.

        Raises:
            UserError: its config does not describe one.
        """
        library, name = self.classes[part]
        if library == "gtl":
            from gtl.families import sight

            config = {key: value for key, value in self.config(part).items() if key != "sight"}
            try:
                built: nn.Module = getattr(sight, name).from_config(config)
            except (TypeError, ValueError, KeyError) as error:
                raise UserError(f"{self.folder / part / 'config.json'}: not that of a {name}: {error}") from error
            return built
        return without_pooler(super().build(part))

    def fingerprint(self, *parts: str) -> str:
        """See `Family`; of the backbone's features also which are kept."""
        found = super().fingerprint(*parts)
        if parts != ("backbone",):
            return found
        return hashlib.sha256(json.dumps([found, self.feature_shapes(0, 0)]).encode()).hexdigest()

    @property
    def is_frozen(self) -> bool:
        """Whether nothing but heads can move."""
        return self.classes["backbone"][1] == "Pixels"

    @property
    def is_fixed(self) -> bool:
        """Whether it takes pictures of one size only."""
        return self.classes["backbone"][1] != STRIDE_32

    @property
    def multiple(self) -> int:
        """The side of its pictures; of a ResNet the pixels between two places of its last features."""
        return int(self.sight["side"]) if self.is_fixed else 32

    @property
    def max_size(self) -> int | None:
        """The side of its pictures, if there is no other."""
        return int(self.sight["side"]) if self.is_fixed else None

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width) of the pictures it was made for."""
        return int(self.sight["side"]), int(self.sight["side"])

    @property
    def finds(self) -> bool:
        """Whether a head looks for objects, so that features of places are needed."""
        return any(task.kind == "boxes" for task in self.tasks.values())

    def feature_shapes(self, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """Of the features of one picture, by name."""
        head = self.config("head")
        needed = ("pooled", "channels", "stride") if self.finds else ("pooled",)
        if lacking := [name for name in needed if name not in head]:
            raise UserError(f"{self.folder / 'head' / 'config.json'}: not that of heads: {lacking[0]}: missing")
        shapes: dict[str, tuple[int, ...]] = {"pooled": (head["pooled"],)}
        if self.finds:
            shapes["map"] = (head["channels"], height // head["stride"], width // head["stride"])
        return shapes

    def encode_images(self, codec: nn.Module | None, pixels: Tensor) -> dict[str, Tensor]:
        """Pixels [B, 3, H, W] in [-1, 1] to features, [B, ...]."""
        assert codec is not None
        found = see(codec, normalized(pixels, self.sight))
        return {name: found[name] for name in self.feature_shapes(0, 0)}

    def encode_prompts(self, encoders: Mapping[str, nn.Module], prompts: Sequence[str]) -> list[Conditions]:
        """None.

        Raises:
            UserError: always.
        """
        raise UserError(f"{self.folder}: its heads look at pictures, and read no captions")

    def blocks(self, main: nn.Module) -> list[tuple[str, ...]]:
        """Blocks in execution order: each residual and each transformer block; none where nothing can move."""
        from torch import nn

        names = {name for name, _ in main.named_modules()}
        place = next((name for name in LISTS if name in names), None)
        blocks: list[tuple[str, ...]] = []
        for number, stage in enumerate(main.get_submodule(place).children() if place else ()):
            inner = getattr(stage, "layers", None)
            ends = [f".layers.{i}" for i in range(len(inner))] if isinstance(inner, nn.Sequential) else [""]
            blocks += [(f"{place}.{number}{end}",) for end in ends]
        return blocks

    def embedders(self, main: nn.Module) -> tuple[str, ...]:
        """What is in front of the blocks."""
        return tuple(name for name in ("network.stem", "embedder", "embeddings") if name in dict(main.named_modules()))

    def counterparts(self, main: nn.Module, larger: nn.Module) -> list[tuple[str, str]]:
        """None: objective.type: distill is not for it."""
        return []

    def export(self, parts: Mapping[str, nn.Module], folder: Path) -> None:
        """Write a whole model: the given parts, everything else copied from `self.folder`."""
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        for name, part in parts.items():
            for old in (folder / name).glob("*.safetensors*"):
                old.unlink()
            write_weights(part, folder / name)


HEAD = {"Heads": "gtl"}


def without_pooler(network: Any) -> nn.Module:
    """A network of transformers less the layer behind its class token, which published weights often lack."""
    pooler = getattr(network, "pooler", None)
    if pooler is not None and any(True for _ in pooler.parameters()):
        network.pooler = None
    return network


def see(network: Any, pixels: Tensor) -> dict[str, Tensor]:
    """What a network makes of pictures that are normalised for it: `pooled` [B, D] and `map` [B, C, h, w]."""
    if not hasattr(network, "main_input_name") or not hasattr(network.config, "model_type"):
        return network(pixels)
    output = network(pixel_values=pixels)
    hidden = output.last_hidden_state
    if hidden.ndim == 4:
        return {"pooled": hidden.mean((2, 3)), "map": hidden}
    side = network.config.patch_size
    height, width = pixels.shape[-2] // side, pixels.shape[-1] // side
    places = hidden[:, -height * width :].transpose(1, 2).unflatten(2, (height, width))
    first = hidden.shape[1] - height * width  # the class token comes first, and then registers
    return {"pooled": hidden[:, 0] if first else hidden.mean(1), "map": places}


def normalized(pixels: Tensor, sight: Mapping[str, Any]) -> Tensor:
    """Pixels in [-1, 1] as a network was taught to see them."""
    mean, std = (pixels.new_tensor(sight[key]).view(3, 1, 1) for key in ("mean", "std"))
    normal: torch.Tensor = ((pixels + 1) / 2 - mean) / std
    return normal
