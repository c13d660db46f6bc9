"""Pictures as files of an answer."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from gtl.images import encode_png
from serve.errors import invalid

if TYPE_CHECKING:
    from PIL.Image import Image


LONGEST = {"webp": 16_383, "jpeg": 65_500}
"""Pixels of a side that a format holds, where it is not any number."""


def check_sides(height: int, width: int, output_format: str) -> None:
    """Let a size pass that a format can hold.

    Raises:
        ApiError: 400; a side is too long.
    """
    longest, most = max(height, width), LONGEST.get(output_format)
    if most is not None and longest > most:
        reason = f"a side of {longest} pixels: should be at most {most} for {output_format}"
        raise invalid("size", reason, "invalid_value")


def encode(
    image: Image, output_format: Literal["png", "webp", "jpeg"], quality: int, told: Mapping[str, Any] | None = None
) -> bytes:
    """The bytes of a file; `told` goes into a PNG's metadata."""
    if output_format == "png":
        return encode_png(image, told or {})
    sink = io.BytesIO()
    image.save(sink, output_format.upper(), quality=quality)
    return sink.getvalue()
