"""What published heads say of pictures or texts: here and now, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gtl.adapters import Registry, apply
from gtl.adapters.base import open_base
from gtl.data.buckets import cover, cut, variants
from gtl.data.fill import to_pixels
from gtl.families import seeing
from gtl.families.boxes import decode as decode_boxes
from gtl.images import BrokenImage, decode
from gtl.types import Progress, UserError, quiet

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

LEAST = 0.3
"""Score of an object that is named."""


@dataclass(frozen=True)
class Said:
    """What one head says of one picture, or of one text."""

    image: str
    """The file, or the text."""
    task: str
    answers: list[Answer]
    """Of classes the likeliest, the first first; of objects those that are seen."""


@dataclass(frozen=True)
class Answer:
    """One thing that a head says."""

    label: str
    score: float
    """From 0 to 1."""
    box: list[float] | None = None
    """x, y, width and height in pixels of the picture."""


def say(
    images: Sequence[str], adapter: str, registry: str, most: int = 3, progress: Progress = quiet
) -> Iterator[Said]:
    """What an adapter's heads say, picture by picture, or text by text if they stand on a text encoder.

    Pictures are cut at the centre to the square that the model was made for, as in training.

    Args:
        images: Files, or texts.
        adapter: NAME, NAME@VERSION or NAME@ALIAS.
        registry: URL of the registry.
        most: Classes that are named.
        progress: Is called as it goes on.

    Raises:
        UserError: there is no such adapter, it has no heads, or a file is no picture.
    """
    shelf = Registry(registry)
    card, version = shelf.resolve(adapter)
    family = seeing(open_base(card))
    if missing := [image for image in images if not family.encoders and not Path(image).is_file()]:
        raise UserError(f"{missing[0]}: no such file")
    parts = {part: family.load(part, torch.float32) for part in (family.main, *family.heads)}
    apply(parts, shelf.fetch(f"{card.name}@{version}"))
    backbone, head = parts[family.main].eval(), parts[family.heads[0]].eval()
    for number, name in enumerate(images):
        progress("look", number, len(images), name)
        if family.encoders:
            with torch.inference_mode():
                (found,) = family.encode_prompts({part: parts[part] for part in family.encoders}, [name])
                outputs = head({key: value[None] for key, value in found.items()})
        else:
            pixels, scale, corner = square(opened(name), family.default_size)
            with torch.inference_mode():
                outputs = head(family.encode_images(backbone, pixels))
        for task, output in outputs.items():
            values = family.tasks[task].values
            if family.tasks[task].kind == "class":
                scores, at = output[0].softmax(0).topk(min(most, len(values)))
                answers = [Answer(values[i], round(float(s), 4)) for s, i in zip(scores, at.tolist(), strict=True)]
            else:
                answers = objects(output, values, pixels.shape[-2:], scale, corner)
            yield Said(name, task, answers)


def opened(name: str) -> Image:
    """A picture.

    Raises:
        UserError: the file is none.
    """
    try:
        return decode(Path(name).read_bytes())
    except BrokenImage as error:
        raise UserError(f"{name}: {error}") from error


def square(image: Image, size: tuple[int, int]) -> tuple[Tensor, float, tuple[int, int]]:
    """The centre of a picture [1, 3, H, W] in [-1, 1], what it was scaled by, and its left and top after that."""
    given = (image.height, image.width)
    variant = variants("", given, size)[0]
    return to_pixels([cut(image, size, variant)]), cover(given, size)[0] / given[0], (variant.left, variant.top)


def objects(
    output: Tensor, values: Sequence[str], size: Sequence[int], scale: float, corner: tuple[int, int]
) -> list[Answer]:
    """The objects that a head has found, in pixels of the picture itself."""
    (found,) = decode_boxes(output)
    answers = []
    for (x, y, w, h), kind, score in zip(found.boxes.tolist(), found.classes.tolist(), found.scores, strict=True):
        if score >= LEAST:
            width, height = w * size[1], h * size[0]
            left, top = x * size[1] - width / 2 + corner[0], y * size[0] - height / 2 + corner[1]
            box = [round(each / scale, 1) for each in (left, top, width, height)]
            answers.append(Answer(values[kind], round(float(score), 4), box))
    return answers
