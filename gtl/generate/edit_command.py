"""What `gtl edit` does."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gtl.adapters.registry import Registry
from gtl.families import denoising
from gtl.generate.command import (
    check_options,
    check_writable,
    choose_base,
    draw_here,
    find_adapters,
    make_requests,
    open_model,
    recipe_of,
    sampling_of,
)
from gtl.generate.edit import Edit, choose_size, fit, size_text
from gtl.generate.prompts import read_prompts
from gtl.types import Progress, UserError

if TYPE_CHECKING:
    from PIL.Image import Image


def run(
    image: str | Path,
    *,
    out: str | Path,
    prompt: str,
    mask: str | Path | None = None,
    strength: float = 0.8,
    model: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    adapters: Sequence[str] = (),
    negative_prompt: str = "",
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    width: int | None = None,
    height: int | None = None,
    count: int = 1,
    registry: str = "./registry",
    progress: Progress | None = None,
) -> list[Path]:
    """Draw `count` pictures that begin at an image into `out`; returns the files, of several pictures the grid last.

    Picture i has seed `seed` + i. Every PNG carries what it was made with, hashes of the image's and the mask's files
    among it. Of a mask, what is transparent, or without transparency what is light, is drawn anew; in all the rest the
    picture has the image's own pixels. An image that does not fit the model is resized and cut; see `choose_size`.

    Raises:
        UserError: an argument, a file, an adapter or the model is wrong; an argument is named as an option.
    """
    from gtl.images import decode, decode_mask

    if count < 1:
        raise UserError(f"--count: {count}: expected 1 or more")
    out = Path(out)
    lines = read_prompts(prompt, None)
    picture, picture_hash = _read(image, f"image {image}", decode)
    area, area_hash = (None, None) if mask is None else _read(mask, f"--mask {mask}", decode_mask)
    if area is not None and area.size != picture.size:
        raise UserError(f"--mask {mask}: {size_text(area)}: expected {size_text(picture)}, the size of {image}")
    chosen = find_adapters(Registry(registry), adapters)
    check_writable(out)
    origin = choose_base(model, chosen, revision, variant)
    opened, fingerprint = open_model(origin, chosen)
    family = denoising(opened)
    high, wide = choose_size(picture, family)
    requests = make_requests(
        lines, count, seed, negative_prompt=negative_prompt, **sampling_of(chosen, steps, guidance),
        height=high if height is None else height, width=wide if width is None else width,
    )  # fmt: skip
    for request in requests:
        check_options(request, family)
    edit = fit(Edit(picture, area, strength), requests[0].height, requests[0].width)
    check_options(requests[0], family, edit)
    recipe = {
        **recipe_of(origin, fingerprint, chosen),
        "edit": {"image": picture_hash, "mask": area_hash, "strength": strength},
    }
    return draw_here(family, requests, chosen, out, recipe, None, progress, edit)


def _read(file: str | Path, where: str, decode: Callable[[bytes], Image]) -> tuple[Image, str]:
    """A decoded file and the hash of its bytes."""
    from gtl.images import BrokenImage

    try:
        data = Path(file).read_bytes()
        return decode(data), hashlib.sha256(data).hexdigest()
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error.strerror}") from error
    except BrokenImage as error:
        raise UserError(f"{where}: {error}") from error
