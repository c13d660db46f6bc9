"""Pictures and masks that clients send, decoded within bounds. It takes a processor's time: call it in a thread."""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from starlette.requests import Request

from gtl.generate.edit import Edit as Start
from gtl.generate.edit import choose_size, fit, marks
from gtl.generate.outpaint import filled
from gtl.images import BrokenImage, decode_canvas, decode_mask
from gtl.types import UserError
from serve.body import read_form
from serve.errors import ApiError, invalid, too_large
from serve.schema import Edit, Limits, check_pixels, parse_edit

if TYPE_CHECKING:
    from PIL.Image import Image

    from gtl.families.base import DiffusionFamily
    from gtl.generate.colours import Palette

FILES = ("image", "mask", "colors_of")
"""Fields of an edit that are pictures, of which the first must be there."""
FORMATS = ("PNG", "JPEG", "WEBP")
"""What OpenAI's API takes; each further format is a decoder more that strangers can reach."""

Decoded = TypeVar("Decoded")
_DATA_URI = re.compile(r"data:image/[a-z0-9.+-]+;base64,", re.IGNORECASE)


class Uploads(NamedTuple):
    """The files of an edit, as they were sent."""

    image: bytes
    mask: bytes | None = None
    colors_of: bytes | None = None


class Canvas(NamedTuple):
    """What an edit starts from."""

    image: Image
    """RGB, upright."""
    mask: Image | None
    """ "L", of the same size: 255 is repainted, 0 is kept. None: all of it may change."""


async def read_edit(request: Request, limits: Limits, *, urls: bool) -> tuple[Edit, Uploads]:
    """The checked fields of POST /v1/images/edits and its files, which `decode_uploads` then decodes.

    A picture may also be a text field: base64, or a data: URI. Nothing else that a text could name is read.

    Raises:
        ApiError: 400 or 413; names the field, its value and what is allowed.
    """
    form = await read_form(request, FILES, limits.max_upload_bytes)
    files, fields = dict(form.files), []
    for name, text in form.fields:
        if name not in FILES:
            fields.append((name, text))
        elif not text:
            continue  # as every empty field of a form
        elif name in files:
            raise invalid(name, "given twice; one file is taken", "invalid_value")
        else:
            files[name] = await asyncio.to_thread(from_base64, text, name, limits.max_upload_bytes)
    edit = parse_edit(fields, limits, urls=urls)
    if "image" not in files:
        raise ApiError(400, "image: missing", code="missing_required_parameter", param="image")
    return edit, Uploads(**files)


def from_base64(text: str, field: str, max_bytes: int) -> bytes:
    """The bytes of base64 text, also as a data: URI.

    Raises:
        ApiError: 400 where it is none, 413 for more than `max_bytes`.
    """
    if head := _DATA_URI.match(text):
        text = text[head.end() :]
    text = "".join(text.split())
    if len(text) * 3 // 4 > max_bytes + 2:
        raise too_large(field, max_bytes)
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:  # of which binascii's is one
        raise invalid(field, "should be a file, or its bytes in base64; no address is read", "invalid_value") from None
    if len(data) > max_bytes:
        raise too_large(field, max_bytes)
    return data


def decode_uploads(uploads: Uploads, limits: Limits) -> Canvas:
    """Decode an edit's files. What is transparent in the picture is its mask where none is sent with it.

    Raises:
        ApiError: 400 or 413; one is no picture, too large, or damaged, or the mask fits the picture not.
    """
    image, clear = _read(decode_canvas, uploads.image, "image", limits)
    if uploads.mask is None:
        return Canvas(image, None) if clear is None or not marks(clear) else Canvas(filled(image, clear), clear)
    mask = _read(decode_mask, uploads.mask, "mask", limits, ("PNG",))
    if mask.size != image.size:
        sizes = f"{mask.width}x{mask.height}: should be of the image's size, {image.width}x{image.height}"
        raise invalid("mask", sizes, "invalid_value")
    if not marks(mask):
        raise invalid("mask", "nothing in it is transparent, or white, so that nothing would change", "invalid_value")
    return Canvas(image, mask)


def begin(
    asked: Edit, uploads: Uploads, limits: Limits, family: DiffusionFamily | None, most: int | None = None
) -> tuple[Start, tuple[int, int] | None]:
    """What an edit begins at, and its (height, width).

    It is cut to that here, and of the picture of colours nothing but these are kept, so that no photograph travels for
    each picture that is drawn; where neither the request nor `family` says how large it is drawn, the size is None and
    the generator cuts.

    Raises:
        ApiError: as `decode_uploads`; 400, a long and narrow picture would be drawn at more than `most` pixels.
    """
    canvas = decode_uploads(uploads, limits)
    palette = None if uploads.colors_of is None else colours(uploads.colors_of, limits)
    start = Start(canvas.image, canvas.mask, asked.strength, shows=asked.invert, palette=palette)
    if asked.pixels is not None:
        size = asked.pixels[1], asked.pixels[0]
    elif family is not None:
        size = choose_size(canvas.image, family)
    else:
        return start, None
    check_pixels(size[1], size[0], most)
    return fit(start, *size), size


def colours(data: bytes, limits: Limits) -> Palette:
    """Those of a picture that was sent for them.

    Raises:
        ApiError: 400 or 413; it is no picture, too large, damaged or transparent.
    """
    from gtl.generate.colours import palette_of

    picture, clear = _read(decode_canvas, data, "colors_of", limits)
    try:
        return palette_of(picture, clear)
    except UserError as error:
        raise invalid("colors_of", str(error), "invalid_image") from None


def _read(
    decoder: Callable[[bytes, int, Sequence[str]], Decoded], data: bytes, field: str, limits: Limits,
    formats: Sequence[str] = FORMATS,
) -> Decoded:  # fmt: skip
    if len(data) > limits.max_upload_bytes:
        raise too_large(field, limits.max_upload_bytes)
    try:
        return decoder(data, limits.max_upload_pixels, formats)
    except BrokenImage as error:
        raise invalid(field, _reason(error, limits), "invalid_image") from None


def _reason(error: BrokenImage, limits: Limits) -> str:
    """What is wrong with a picture, without the words of the library that stumbled over it."""
    text, cause = str(error), error.__cause__
    if cause is None or text.startswith("no image"):
        return text
    if type(cause).__name__ == "DecompressionBombError":
        return f"more than the allowed {limits.max_upload_pixels} pixels"
    return "damaged or cut short"
