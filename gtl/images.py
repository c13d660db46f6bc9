"""Pictures in and out: bounded decoding of anything, PNG files that carry their recipe, grids."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile, PngInfo

from gtl.storage import replacing
from gtl.types import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_PIXELS = 2**27
"""134 megapixels, 400 MB decoded."""
PIECES, PIECE_BYTES = 100_000, 1024
"""A file may be read in so many pieces, and in one more for each of so many bytes."""
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
"""Formats that are opened; Pillow's others include ones that start programs (EPS)."""
EXTENSIONS = frozenset(
    ".avif .bmp .gif .j2k .jfif .jp2 .jpeg .jpg .mpo .pgm .png .pnm .ppm .tif .tiff .webp".split()
)  # fmt: skip
"""Lower-case file-name endings of `FORMATS`."""

_ORIENTATION = 0x0112
_RECIPE = "gtl"
_LABEL_HEIGHT = 16
_PNG = b"\x89PNG\r\n\x1a\n"
_LIGHT = 2**18


class BrokenImage(ValueError):
    """Bytes that are no usable image; the message is the reason."""


class _Pieces(io.BytesIO):
    """A file that is read in a bounded number of pieces.

    Pillow walks chunks and segments in Python; a million and a half of them, in a file of 18 MB, took it half a minute.
    """

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self._left = PIECES + len(content) // PIECE_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        """The next bytes.

        Raises:
            OSError: there were too many pieces.
        """
        self._left -= 1
        if self._left < 0:
            raise OSError("in too many pieces")
        return super().read(size)


def decode(
    data: bytes | str | os.PathLike[str], max_pixels: int = MAX_PIXELS, formats: Sequence[str] = FORMATS
) -> Image.Image:
    """Decode the first frame to 8-bit RGB, upright, transparency on white.

    Raises:
        BrokenImage: not an image in one of the formats, damaged, cut short, larger than `max_pixels`, or without a
            defined range of values.
        OSError: the path cannot be read.
    """
    image = _open(data, max_pixels, formats)
    try:
        return to_rgb(ImageOps.exif_transpose(image))
    except BrokenImage:
        raise
    except Exception as error:  # damaged files make decoders raise nearly anything
        raise BrokenImage(_reason(error)) from error


def decode_mask(
    data: bytes | str | os.PathLike[str], max_pixels: int = MAX_PIXELS, formats: Sequence[str] = FORMATS
) -> Image.Image:
    """Decode a mask to L, upright, white where something is to happen: where it is transparent, or else light.

    Raises:
        BrokenImage: see `decode`.
        OSError: the path cannot be read.
    """
    image, clear = decode_canvas(data, max_pixels, formats)
    return image.convert("L") if clear is None else clear


def decode_canvas(
    data: bytes | str | os.PathLike[str], max_pixels: int = MAX_PIXELS, formats: Sequence[str] = FORMATS
) -> tuple[Image.Image, Image.Image | None]:
    """Decode as `decode` does, and where the image is transparent, as a mask; None where nothing of it is.

    Raises:
        BrokenImage: see `decode`.
        OSError: the path cannot be read.
    """
    image = _open(data, max_pixels, formats)
    try:
        image = ImageOps.exif_transpose(image)
        return to_rgb(image), _transparency(image)
    except BrokenImage:
        raise
    except Exception as error:  # as in `decode`
        raise BrokenImage(_reason(error)) from error


def _transparency(image: Image.Image) -> Image.Image | None:
    """Mode L, white where a picture is transparent; None where it is opaque throughout."""
    if not image.has_transparency_data:
        return None
    opacity = image.convert("RGBA").getchannel("A")
    return ImageOps.invert(opacity) if opacity.getextrema() != (255, 255) else None


def probe(data: bytes | str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) of the upright image, from the header where that says how the camera was turned.

    A PNG may say so behind its pixels, so one whose header does not is decoded to look for it.

    Raises:
        BrokenImage: not an image, larger than `max_pixels`, or a damaged one among those that are decoded.
        OSError: the path cannot be read.
    """
    image = _open(data, max_pixels)
    try:
        sideways = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
    except Exception as error:  # as in `decode`
        raise BrokenImage(_reason(error)) from error
    width, height = image.size
    return (width, height) if sideways else (height, width)


def _open(data: bytes | str | os.PathLike[str], max_pixels: int, formats: Sequence[str] = FORMATS) -> Image.Image:
    content = data if isinstance(data, bytes) else Path(data).read_bytes()
    if not content:
        raise BrokenImage("the file is empty")
    Image.init()
    try:
        image = Image.open(_Pieces(content), formats=[name for name in formats if name in Image.OPEN])
    except UnidentifiedImageError as error:
        raise BrokenImage(f"no image in a known format ({', '.join(formats)})") from error
    except Exception as error:  # as in `decode`
        raise BrokenImage(_reason(error)) from error
    if image.width * image.height > max_pixels:
        raise BrokenImage(f"{image.width}x{image.height} pixels, more than the allowed {max_pixels}")
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of a picture in any mode, transparency on white.

    Raises:
        BrokenImage: its values have no defined range.
    """
    if image.mode == "F":
        raise BrokenImage("floating-point pixels, whose range is not defined; save it with 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _scale_16_bit(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    image.load()
    return image.convert("RGB")


def _scale_16_bit(image: Image.Image) -> Image.Image:
    """Grey of 16 bits to 8: Pillow's own conversion clips instead of scaling."""
    wide = image.convert("I")
    low, high = cast("tuple[int, int]", wide.getextrema())
    if low < 0 or high > 65535:
        raise BrokenImage(f"32-bit pixels from {low} to {high}; save it with 8 or 16 bits")
    return wide.point(lambda value: value * (1 / 257) + 0.5).convert("L")


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def save_png(image: Image.Image, path: str | os.PathLike[str], recipe: Mapping[str, Any]) -> None:
    """Write a PNG with the recipe that drew it as a text chunk; whole or not at all."""
    write_png(encode_png(image, recipe), path)


def encode_png(image: Image.Image, recipe: Mapping[str, Any]) -> bytes:
    """The bytes of a PNG with the recipe that drew it as a text chunk."""
    info = PngInfo()
    info.add_itxt(_RECIPE, json.dumps(recipe, sort_keys=True, ensure_ascii=False))
    sink = io.BytesIO()
    image.save(sink, "PNG", pnginfo=info)
    return sink.getvalue()


def write_png(data: bytes, path: str | os.PathLike[str]) -> None:
    """Write what `encode_png` made; whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def read_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The recipe that `save_png` put into a file.

    Raises:
        UserError: there is none.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            assert isinstance(image, PngImageFile)
            text = image.text.get(_RECIPE)
    except (OSError, SyntaxError) as error:
        raise UserError(f"{os.fspath(path)}: cannot be read as PNG ({error})") from error
    if text is None:
        raise UserError(f"{os.fspath(path)}: holds no recipe; only pictures made by gtl carry one")
    value = json.loads(text)
    assert isinstance(value, dict)
    return value


def preview(data: bytes, side: int) -> tuple[str, int]:
    """(data: URI, original width) of a picture for a page: as it is if PNG and small enough, else as JPEG.

    Args:
        data: A picture.
        side: Longest side in pixels of what is returned.

    Raises:
        BrokenImage: see `decode`.
    """
    image = decode(data)
    width = image.width
    if max(image.size) <= side and data.startswith(_PNG) and len(data) <= _LIGHT:
        return _data_uri("image/png", data), width
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=88)
    return _data_uri("image/jpeg", sink.getvalue()), width


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def grid(images: Sequence[Image.Image], columns: int, labels: Sequence[str] | None = None) -> Image.Image:
    """Images row by row on white, in cells of the largest width and height, each with its label underneath."""
    if not images or columns < 1 or (labels is not None and len(labels) != len(images)):
        raise ValueError(f"{len(images)} images in {columns} columns with {len(labels or ())} labels")
    columns = min(columns, len(images))
    width = max(image.width for image in images)
    height = max(image.height for image in images)
    cell = height + (_LABEL_HEIGHT if labels else 0)
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * cell), "white")
    pen = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x, y = i % columns * width, i // columns * cell
        sheet.paste(image, (x, y))
        if labels:
            pen.text((x + 2, y + height + 2), labels[i], fill="black")
    return sheet


def cells(sheet: Image.Image, columns: int, number: int) -> list[Image.Image]:
    """The pictures of a `grid` of so many, without labels."""
    columns = min(columns, number)
    width, height = sheet.width // columns, sheet.height // -(-number // columns)
    corners = [(i % columns * width, i // columns * height) for i in range(number)]
    return [sheet.crop((x, y, x + width, y + height)) for x, y in corners]


def outline(image: Image.Image, mirrored: bool = False) -> NDArray[np.float64]:
    """A picture's broad masses, left and right exchanged if asked for: a vector of unit length, whose products with
    others' say how alike they are, however sharp; zeros of a picture that has none."""
    import numpy as np

    small = image.convert("RGB").resize((16, 16), Image.Resampling.BOX)
    small = small.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else small
    values = np.asarray(small, dtype=np.float64).ravel()
    values = values - values.mean()
    norm = float(np.linalg.norm(values))
    return values / norm if norm > 1e-6 else np.zeros_like(values)


def blur(image: Image.Image) -> Image.Image:
    """A picture of the same size that shows where it is light and dark, and nothing else: 8 x 8 colours, smoothed."""
    return image.resize((8, 8), Image.Resampling.BOX).resize(image.size, Image.Resampling.BICUBIC)
