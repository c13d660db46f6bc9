"""Models of transformers that see, with their own preprocessing."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gtl.backbones.extractor import BATCH, Extractor, exact
from gtl.backbones.place import explained, source_of
from gtl.imports import light, quieted
from gtl.types import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

NEEDED = "a transformers model that sees, with its preprocessor"


class Vision(nn.Module):
    """Of a model's output its pooled features; without a pooler the class token, and without that the tokens' mean."""

    def __init__(self, model: nn.Module, has_pooler: bool) -> None:
        super().__init__()
        self.model, self.has_pooler = model, has_pooler
        self.has_class_token = any(re.search("cls_token|class_(embedding|token)", name) for name in model.state_dict())

    def forward(self, pixels: Tensor) -> tuple[Tensor, None]:
        """[N, 3, H, W] to [N, D]."""
        output = self.model(pixel_values=pixels)
        if self.has_pooler and getattr(output, "pooler_output", None) is not None:
            return output.pooler_output.flatten(1), None
        tokens = output.last_hidden_state
        return tokens[:, 0] if self.has_class_token else tokens.mean(1), None


class Clip(nn.Module):
    """CLIP's projected embeddings of unit length."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> tuple[Tensor, None]:
        """[N, 3, H, W] to [N, D]."""
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        return nn.functional.normalize(self.model.visual_projection(pooled), dim=1), None

    def texts(self, tokens: Mapping[str, Tensor]) -> Tensor:
        """Tokens [N, L] and their mask to [N, D]."""
        return nn.functional.normalize(self.model.text_projection(self.model.text_model(**tokens).pooler_output), dim=1)


class ClipExtractor(Extractor):
    """A `TextBackbone`."""

    def __init__(self, *args: Any, tokenize: Callable[[list[str]], Mapping[str, Tensor]]) -> None:
        """See `Extractor`; `tokenize` gives `input_ids` and `attention_mask` of texts."""
        super().__init__(*args)
        self._tokenize = tokenize

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """See `TextBackbone`."""
        if not texts:
            raise ValueError("no texts")
        found = []
        for start in range(0, len(texts), BATCH):
            tokens = self._tokenize(list(texts[start : start + BATCH]))
            with exact():
                assert isinstance(self.network, Clip)
                found.append(self.network.texts({k: v.to(self._device) for k, v in tokens.items()}).cpu())
        return torch.cat(found)


def find_pretrained(spec: str) -> str:
    """What transformers opens: see `gtl.backbones.place.source_of`.

    Raises:
        UserError: there is no such folder, and the hub can have no model of that name.
    """
    return source_of(
        spec, "a backbone is builtin:backbone, inception:FILE, or a folder or hub id of a transformers model that sees"
    )


def open_pretrained(spec: str) -> Extractor:
    """A model of a local folder or of the hub.

    Raises:
        UserError: there is no such model, it is none that sees, or its files are damaged or incomplete.
    """
    source = find_pretrained(spec)
    with light():
        from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

    with explained(spec, NEEDED), quieted():
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False, **pillow())
        model, info = AutoModel.from_pretrained(
            source,
            dtype=torch.float32,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are found out below, by name
            output_loading_info=True,
        )
    # Names, since transformers 5 with both shapes.
    if odd := sorted(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]):
        raise UserError(f"{spec}: {odd[0]} has another shape than config.json describes")
    missing = sorted(info["missing_keys"])
    if unloaded := [name for name in missing if "pooler." not in name]:
        raise UserError(f"{spec}: {len(unloaded)} of the model's weights are missing, the first is {unloaded[0]}")

    def prepare(image: Any) -> Tensor:
        return processor(images=[image], return_tensors="pt")["pixel_values"][0]

    settings = processor.to_dict()
    resize = describe(settings)
    known = {"network": _portable(config.to_dict()), "preprocessing": settings}
    if config.model_type == "clip":
        with explained(spec, NEEDED), quieted():
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        limit = config.text_config.max_position_embeddings

        def tokenize(texts: list[str]) -> Mapping[str, Tensor]:
            tokens = tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
            return {name: tokens[name] for name in ("input_ids", "attention_mask")}

        clip = Clip(model)
        return ClipExtractor(spec, resize, config.projection_dim, clip, prepare, known, tokenize=tokenize)
    if model.main_input_name != "pixel_values":
        raise UserError(f"{spec}: a {type(model).__name__}, which does not see; name a CLIP, DINOv2, ViT or the like")
    vision = Vision(model.eval(), has_pooler=not missing)
    return Extractor(spec, resize, _dimensions(vision, prepare), vision, prepare, known)


def describe(settings: Mapping[str, Any]) -> str:
    """What a preprocessor does to a picture, for people."""
    from transformers.image_utils import PILImageResampling

    parts = []
    if settings.get("do_resize"):
        filtered = PILImageResampling(settings["resample"]).name.lower()
        parts.append(f"{filtered} to {_size(settings['size'])}, antialiased")
    if settings.get("do_center_crop"):
        parts.append(f"centre crop {_size(settings['crop_size'])}")
    if settings.get("do_normalize"):
        mean, std = (", ".join(f"{value:.4g}" for value in settings[key]) for key in ("image_mean", "image_std"))
        parts.append(f"less the mean ({mean}), by ({std})")
    return "; ".join(parts) or "as they are"


def _size(size: Mapping[str, int]) -> str:
    if "height" in size:
        return f"{size['width']} x {size['height']}"
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in size.items() if value)


def pillow() -> dict[str, Any]:
    """What makes transformers preprocess with Pillow where torchvision is installed, too: the two differ in pixels."""
    return {"backend": "pil"} if find_spec("transformers.image_processing_backends") else {"use_fast": False}


def _portable(config: dict[str, Any]) -> dict[str, Any]:
    """A model's config without the place where it was found."""
    return {key: value for key, value in config.items() if key != "_name_or_path"}


def _dimensions(network: nn.Module, prepare: Callable[[Any], Tensor]) -> int:
    """Measured on a black picture: configs say it under many names."""
    import numpy as np

    with exact():
        return int(network(prepare(np.zeros((32, 32, 3), np.uint8))[None])[0].shape[1])
