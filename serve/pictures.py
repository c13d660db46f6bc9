"""Pictures as files of an answer."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from gtl.images import encode_png

if TYPE_CHECKING:
    from PIL.Image import Image


def encode(
    image: Image, output_format: Literal["png", "webp", "jpeg"], quality: int, told: Mapping[str, Any] | None = None
) -> bytes:
    """The bytes of a file; `told` goes into a PNG's metadata."""
    if output_format == "png":
        return encode_png(image, told or {})
    sink = io.BytesIO()
    image.save(sink, output_format.upper(), quality=quality)
    return sink.getvalue()
