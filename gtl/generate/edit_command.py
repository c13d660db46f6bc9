"""What `gtl edit` does."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from gtl.adapters.registry import Registry
from gtl.families import denoising
from gtl.generate.command import (
    Adapter,
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
from gtl.generate.edit import IMAGE_GUIDANCE, STRENGTH, Edit, choose_size, fit, marks, size_text
from gtl.generate.outpaint import Border, check_canvas, filled, fitting, parse_border
from gtl.generate.outpaint import extend as outpaint
from gtl.generate.prompts import read_prompts
from gtl.types import Progress, UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from gtl.families.base import DiffusionFamily
    from gtl.generate.colours import Palette

Decoded = TypeVar("Decoded")


def run(
    image: str | Path,
    *,
    out: str | Path,
    prompt: str,
    mask: str | Path | None = None,
    extend: str | None = None,
    strength: float | None = None,
    invert: str | None = None,
    image_guidance: float | None = None,
    colors_of: str | Path | None = None,
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
    picture has the image's own pixels. Without one, what is transparent in the image is. An image that does not fit the
    model is resized and cut; see `choose_size`. One that is to be extended is not: its border grows until all fits.
    With an adapter that was taught to edit, the prompt is the instruction, and the model sees the image meanwhile. With
    `invert`, which says what the image shows, it is drawn from the noise that draws the image, and so no further seed
    draws another picture. What is drawn gets the colours of the picture `colors_of`; see `match_colours`.

    Raises:
        UserError: an argument, a file, an adapter or the model is wrong; an argument is named as an option.
    """
    if count < 1:
        raise UserError(f"--count: {count}: expected 1 or more")
    if count > 1 and invert is not None:
        raise UserError(f"--count: {count}: an edit by --invert draws no noise: all would be one picture; expected 1")
    border = None if extend is None else parse_border(extend)
    if border is not None and not width is height is None:
        raise UserError(f"--extend: {extend}: says how large the picture is; leave --width and --height out")
    out = Path(out)
    lines = read_prompts(prompt, None)
    picture, area, hashes = read_image(image, mask)
    palette = None
    if colors_of is not None:
        palette, hashes["colors_of"] = read_colours(colors_of)
    chosen = find_adapters(Registry(registry), adapters)
    way = way_of(chosen, strength, image_guidance)
    check_writable(out)
    origin = choose_base(model, chosen, revision, variant)
    opened, fingerprint = open_model(origin, chosen)
    family = denoising(opened)
    if border is not None:
        picture, area, border = grow(picture, area, border, family)
    high, wide = (picture.height, picture.width) if border is not None else choose_size(picture, family)
    requests = make_requests(
        lines, count, seed, negative_prompt=negative_prompt, **sampling_of(chosen, steps, guidance),
        height=high if height is None else height, width=wide if width is None else width,
    )  # fmt: skip
    for request in requests:
        check_options(request, family)
    edit = fit(Edit(picture, area, **way, shows=invert, palette=palette), requests[0].height, requests[0].width)
    check_options(requests[0], family, edit)
    told = (
        {**hashes, **way}
        | ({} if invert is None else {"invert": invert})
        | ({} if border is None else {"extend": list(border)})
    )
    recipe = {**recipe_of(origin, fingerprint, chosen), "edit": told}
    return draw_here(family, requests, chosen, out, recipe, None, progress, edit)


def way_of(adapters: Sequence[Adapter], strength: float | None, image_guidance: float | None) -> dict[str, Any]:
    """How an image is edited: begun at, or shown to the model where an adapter was taught for that.

    Raises:
        UserError: an option is for the other way.
    """
    editor = next((adapter for adapter in adapters if adapter.edits), None)
    if editor is None:
        if image_guidance is not None:
            raise UserError(f"--image-guidance: {image_guidance:g}: no --adapter was taught to edit; leave it out")
        return {"strength": STRENGTH if strength is None else strength}
    if strength is not None:
        raise UserError(
            f"--strength: {strength:g}: {editor.name} was taught to edit: it sees the image and begins at noise; give "
            "--image-guidance, which is higher where more is to stay"
        )
    return {"image_guidance": IMAGE_GUIDANCE if image_guidance is None else image_guidance}


def read_image(image: str | Path, mask: str | Path | None) -> tuple[Image, Image | None, dict[str, str | None]]:
    """An image, what of it is to be drawn anew, and the hashes of the files by name.

    Raises:
        UserError: a file is no picture, or the two are not of one size.
    """
    from gtl.images import decode_canvas, decode_mask

    (picture, clear), picture_hash = _read(image, f"image {image}", decode_canvas)
    if mask is None:
        hashes = {"image": picture_hash, "mask": None}
        return (picture, None, hashes) if clear is None or not marks(clear) else (filled(picture, clear), clear, hashes)
    area, area_hash = _read(mask, f"--mask {mask}", decode_mask)
    if area.size != picture.size:
        raise UserError(f"--mask {mask}: {size_text(area)}: expected {size_text(picture)}, the size of {image}")
    return picture, area, {"image": picture_hash, "mask": area_hash}


def read_colours(file: str | Path) -> tuple[Palette, str]:
    """The colours of a picture, and the hash of its file.

    Raises:
        UserError: it is no picture, or nothing but transparent.
    """
    from gtl.generate.colours import palette_of
    from gtl.images import decode_canvas

    where = f"--colors-of {file}"
    (picture, clear), picture_hash = _read(file, where, decode_canvas)
    try:
        return palette_of(picture, clear), picture_hash
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def grow(picture: Image, area: Image | None, border: Border, family: DiffusionFamily) -> tuple[Image, Image, Border]:
    """The canvas, its mask, and the border that makes it fit the model.

    Raises:
        UserError: the canvas is larger than the model draws.
    """
    from gtl.images import MAX_PIXELS

    border = fitting(border, picture.width, picture.height, family.multiple)
    check_canvas(border, picture.width, picture.height, family.max_size, MAX_PIXELS)
    return (*outpaint(picture, area, border), border)


def _read(file: str | Path, where: str, decode: Callable[[bytes], Decoded]) -> tuple[Decoded, str]:
    """A decoded file and the hash of its bytes."""
    from gtl.images import BrokenImage

    try:
        data = Path(file).read_bytes()
        return decode(data), hashlib.sha256(data).hexdigest()
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error.strerror}") from error
    except BrokenImage as error:
        raise UserError(f"{where}: {error}") from error
