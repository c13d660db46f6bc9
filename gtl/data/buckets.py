"""Aspect-ratio buckets, and the way from an image to a training crop without distortion."""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from gtl.types import Geometry, UserError

if TYPE_CHECKING:
    from PIL.Image import Image

Size = tuple[int, int]
"""(height, width) in pixels."""

MAX_ASPECT = 2.0
"""Longer side over shorter side of the narrowest bucket; longer images lose their ends."""


class Variant(NamedTuple):
    """One way to cut a training crop out of an image."""

    top: int
    """Of the crop, after the resize."""
    left: int
    flip: bool
    """Mirrored after the crop."""


def bucket_sizes(
    resolution: int, multiple: int, max_aspect: float = MAX_ASPECT, max_size: int | None = None
) -> tuple[Size, ...]:
    """Crop sizes of about resolution² pixels whose sides are multiples of `multiple`, the square among them, sorted.

    Sides are about resolution/16 apart, so that a family with a small `multiple` does not scatter few images over
    very many buckets. `max_aspect` 1 leaves only the square. No side is longer than `max_size`.

    Raises:
        UserError: the resolution is not a multiple, or above `max_size`.
    """
    if resolution < 1 or resolution % multiple:
        below = max(0, resolution // multiple * multiple)
        right = f"{below} or {below + multiple}" if below else f"{multiple}"
        raise UserError(f"data.resolution: {resolution}: this model needs a multiple of {multiple}, such as {right}")
    if max_size is not None and resolution > max_size:
        raise UserError(f"data.resolution: {resolution}: this model takes at most {max_size}")
    step = multiple * max(1, round(resolution / 16 / multiple))
    sizes = {(resolution, resolution)}
    for short in range(resolution - step, 0, -step):
        long = round(resolution * resolution / short / step) * step
        if long / short > max_aspect or (max_size is not None and long > max_size):
            break
        sizes |= {(short, long), (long, short)}
    return tuple(sorted(sizes))


@lru_cache(maxsize=1 << 16)
def choose_bucket(size: Size, sizes: tuple[Size, ...]) -> Size:
    """The bucket whose aspect ratio is nearest, by the logarithm of the ratio."""
    aspect = math.log(size[1] / size[0])
    return min(sizes, key=lambda s: (round(abs(math.log(s[1] / s[0]) - aspect), 9), -s[0] * s[1]))


def cover(size: Size, bucket: Size) -> Size:
    """The size an image is resized to: its own aspect ratio, just covering the bucket."""
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    return max(bucket[0], round(size[0] * scale)), max(bucket[1], round(size[1] * scale))


def variants(
    sha256: str, size: Size, bucket: Size, *, crops: int = 1, flip: bool = False, seed: int = 0
) -> list[Variant]:
    """The distinct crops of an image, each also mirrored: the centre first, the others at places drawn by the seed."""
    resized = cover(size, bucket)
    free = resized[0] - bucket[0], resized[1] - bucket[1]
    places = [(free[0] // 2, free[1] // 2)]
    for i in range(1, crops):
        digest = hashlib.sha256(f"{sha256} {seed} {i}".encode()).digest()
        places.append(
            (
                int.from_bytes(digest[:8], "big") % (free[0] + 1),
                int.from_bytes(digest[8:16], "big") % (free[1] + 1),
            )
        )
    flips = (False, True) if flip else (False,)
    return [Variant(top, left, mirrored) for top, left in dict.fromkeys(places) for mirrored in flips]


def variant_key(sha256: str, bucket: Size, variant: Variant) -> str:
    """Cache key of an image variant: a hash of the file's bytes and of everything done to its pixels."""
    text = f"{sha256} {bucket[0]}x{bucket[1]} {variant.top} {variant.left} {int(variant.flip)}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def geometry(size: Size, bucket: Size, variant: Variant) -> Geometry:
    """What the model may be told about the crop; a mirrored one counts its left edge in the mirrored image."""
    free = cover(size, bucket)[1] - bucket[1]
    return Geometry(size, (variant.top, free - variant.left if variant.flip else variant.left), bucket)


def cut(image: Image, bucket: Size, variant: Variant) -> Image:
    """The training crop: resize by Lanczos and crop in one step, then mirror."""
    from PIL import Image as Images
    from PIL import ImageOps

    resized = cover((image.height, image.width), bucket)
    down, across = image.height / resized[0], image.width / resized[1]
    # The product can exceed the image by a rounding error, which Pillow refuses.
    bottom = min(image.height, (variant.top + bucket[0]) * down)
    right = min(image.width, (variant.left + bucket[1]) * across)
    box = (variant.left * across, variant.top * down, right, bottom)
    crop = image.resize((bucket[1], bucket[0]), Images.Resampling.LANCZOS, box=box)
    return ImageOps.mirror(crop) if variant.flip else crop
