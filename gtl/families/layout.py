"""What all models in diffusers layout have in common: folders of configs and safetensors."""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from gtl.families.files import INDEX, components, hash_files, patterns, read_json, weight_files
from gtl.families.loading import fill, parameters_on_meta, read_tensors, ties_of
from gtl.families.targets import find_encoder_targets
from gtl.imports import absent, light, quieted
from gtl.types import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class DiffusersLayout:
    """A model folder, read through the verbs of `gtl.families.base.Family` that need no architecture."""

    name: ClassVar[str]
    main: ClassVar[str]
    classes: Mapping[str, tuple[str, str]]
    """Of every part: the library and class it is made with. Of an opened model: of the parts that it has."""
    aliases: ClassVar[Mapping[str, str]] = {}
    """Names that models were published under before a class was renamed -> its name."""
    heads: tuple[str, ...] = ()
    draws_alone: ClassVar[bool] = True
    optional: ClassVar[frozenset[str]] = frozenset()
    """Parts that a model may go without."""
    companions: ClassVar[Mapping[str, str]] = {}
    """Of some parts: the folder beside it that belongs to it, such as a text encoder's tokenizer."""
    origin: tuple[str, str, str | None, str | None] | None = None
    """What `open_family` was asked for, if it made this."""
    configs_only: bool = False
    """Whether it was opened to ask for shapes, and its weight files need not be there."""

    def __init__(self, folder: Path, variant: str | None = None) -> None:
        """No weight is read.

        Raises:
            UserError: a part is of another class than the family's.
        """
        self.folder = folder
        self.variant = variant
        self.index = read_json(folder / INDEX)
        self.check_index()

    def check_index(self) -> None:
        """Settle which parts the model has.

        Raises:
            UserError: one is of another class than the family's.
        """
        missing = self.optional.difference(components(self.index))
        self.classes = {part: expected for part, expected in self.classes.items() if part not in missing}
        for part, expected in self.classes.items():
            found = self.index.get(part) or [None, None]
            name = found[1] if isinstance(found, list) and len(found) == 2 else found
            if self.aliases.get(str(name), name) != expected[1]:
                raise UserError(f"{self.folder / INDEX}: {part}: {name}; expected {expected[1]}")

    def __reduce__(self) -> tuple[Any, ...]:
        """By where it came from: on another machine its folder is elsewhere, or not there yet."""
        if self.origin is None:
            return type(self), (self.folder, self.variant)
        from gtl.families import open_family

        return open_family, self.origin

    def config(self, part: str) -> dict[str, Any]:
        """A part's config.json."""
        return self._configs[part]

    @functools.cached_property
    def _configs(self) -> dict[str, dict[str, Any]]:
        return {part: read_json(self.folder / part / "config.json") for part in self.classes}

    @functools.cached_property
    def scheduler_config(self) -> dict[str, Any]:
        """The sampler's config, which also describes the noise path."""
        return read_json(self.folder / "scheduler" / "scheduler_config.json")

    def lora_targets(self, main: nn.Module, targets: str | Sequence[str]) -> list[str]:
        """None.

        Raises:
            UserError: always.
        """
        raise UserError(f"tuner.targets: {targets}: LoRA is not for models of family {self.name}")

    def cross_attentions(self, main: nn.Module) -> tuple[str, ...]:
        """None: it reads no text."""
        return ()

    def build(self, part: str) -> nn.Module:
        """The part from its config, with whatever weights the surrounding device context gives."""
        library, name = self.classes[part]
        with light():
            model: Any = getattr(importlib.import_module(library), name)
        config = dict(self.config(part))
        try:
            module: nn.Module = (
                model.from_config(config) if library == "diffusers" else model(model.config_class.from_dict(config))
            )
        except Exception as error:  # libraries refuse what is wrong in many ways
            reason = " ".join(str(error).split())
            raise UserError(f"{self.folder / part / 'config.json'}: not that of a {name}: {reason}") from error
        return module

    def weights(self, part: str) -> Iterator[tuple[str, Tensor]]:
        """Stored tensors one by one, keyed as in the module's state dict; one tensor is in memory at a time."""
        with parameters_on_meta():
            module = self.build(part)
        files = weight_files(self.folder / part, self.variant)
        yield from read_tensors(files, module.state_dict().keys(), ties_of(module))

    def load(self, part: str, dtype: torch.dtype | None = None, device: str = "cpu") -> nn.Module:
        """Build and fill a part, frozen and in eval mode. dtype None keeps the stored one; on meta nothing is filled.

        Raises:
            UserError: files are missing, damaged, or do not match the config.
        """
        if device == "meta":
            import torch

            with torch.device("meta"):
                module = self.build(part)
            for tensor in module.state_dict(keep_vars=True).values():
                if dtype is not None and tensor.is_floating_point():
                    tensor.data = tensor.data.to(dtype)
            return module.requires_grad_(False).eval()
        files = weight_files(self.folder / part, self.variant)
        with parameters_on_meta():
            module = self.build(part)
        where = files[0] if len(files) == 1 else files[0].parent
        fill(module, read_tensors(files, module.state_dict().keys(), ties_of(module)), dtype, where)
        return module.requires_grad_(False).eval().to(device)

    def encoder_targets(self, encoder: nn.Module, targets: str | Sequence[str]) -> list[str]:
        """Full names of the layers of a text encoder that a target set names, in order."""
        return find_encoder_targets(encoder, targets)

    def fingerprint(self, *parts: str) -> str:
        """Hash (hex) of the parts' weights, configs and companions; no parts means all, with the sampler's config."""
        digest = hashlib.sha256()
        for part in sorted(parts or self.classes):
            config = {key: value for key, value in self.config(part).items() if not key.startswith("_")}
            digest.update(f"{part} {json.dumps(config, sort_keys=True)}".encode())
            files = weight_files(self.folder / part, self.variant)
            if part in self.companions:
                beside = self.folder / self.companions[part]
                if not beside.is_dir():
                    raise UserError(f"{beside}: no such folder; the model is incomplete")
                files += sorted(path for path in beside.iterdir() if path.is_file())
            digest.update(" ".join(hash_files(files)).encode())
        if not parts:
            digest.update(json.dumps(self.scheduler_config, sort_keys=True).encode())
        return digest.hexdigest()

    def export(self, parts: Mapping[str, nn.Module], folder: Path) -> None:
        """Write a full diffusers-layout model: the given parts, everything else copied from `self.folder`."""
        index = dict(self.index)
        wanted = [name for name in components(index) if name not in parts]
        for pattern in patterns(wanted, self.variant):
            for path in self.folder.glob(pattern):
                self._copy(path.relative_to(self.folder).as_posix(), folder)
        with absent("deepspeed"), quieted():  # accelerate would import it, and it warns where there is no GPU
            for name, part in parts.items():
                part.save_pretrained(folder / name)  # type: ignore[operator]
        gone = [name for name in components(index) if not (folder / name).is_dir()]
        index |= {name: [None, None] for name in gone}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _copy(self, name: str, folder: Path) -> None:
        """Copy a file; the copy is the plain variant."""
        middle = f".{self.variant}"
        target = folder / (name.replace(middle, "") if self.variant else name)
        target.parent.mkdir(parents=True, exist_ok=True)
        if self.variant and name.endswith(f".index{middle}.json"):
            target.write_text((self.folder / name).read_text(encoding="utf-8").replace(middle, ""), encoding="utf-8")
        else:
            shutil.copyfile(self.folder / name, target)
