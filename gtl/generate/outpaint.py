"""Pictures that go on beyond an image's edges: a larger canvas, of which inpainting draws what the image leaves blank.

What is drawn begins at the edges' own colours, continued outwards, as far as its strength leaves anything of them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from gtl.types import UserError

if TYPE_CHECKING:
    from PIL.Image import Image


class Border(NamedTuple):
    """Pixels beyond each edge of an image."""

    left: int
    top: int
    right: int
    bottom: int


def parse_border(text: str) -> Border:
    """LEFT,TOP,RIGHT,BOTTOM in pixels, or one number for all four.

    Raises:
        UserError: it is neither, or adds nothing.
    """
    fields = [field.strip() for field in text.split(",")]
    # int() would also read "+1", "1_0" and digits of other scripts; six digits are more than any canvas has.
    if len(fields) not in (1, 4) or not all(f.isascii() and f.isdigit() and len(f) <= 6 for f in fields):
        raise UserError(
            f"--extend: {text}: expected LEFT,TOP,RIGHT,BOTTOM in pixels, such as 128,0,128,0, or one number"
        )
    border = Border(*map(int, fields * (4 // len(fields))))
    if not any(border):
        raise UserError(f"--extend: {text}: adds nothing; expected a number above 0")
    return border


def fitting(border: Border, width: int, height: int, multiple: int) -> Border:
    """The border with what the canvas of a width x height image lacks to a multiple, on the side that grows more."""
    across = -(width + border.left + border.right) % multiple
    down = -(height + border.top + border.bottom) % multiple
    if border.left > border.right:
        border = border._replace(left=border.left + across)
    else:
        border = border._replace(right=border.right + across)
    if border.top > border.bottom:
        return border._replace(top=border.top + down)
    return border._replace(bottom=border.bottom + down)


def check_canvas(border: Border, width: int, height: int, most: int | None, pixels: int) -> None:
    """Refuse a canvas that a model cannot draw, before it takes memory.

    Args:
        border: Beyond a width x height image.
        width: In pixels.
        height: In pixels.
        most: The longest side that the model draws; None: any.
        pixels: That a picture may have.

    Raises:
        UserError: it is too large.
    """
    wide, high = width + border.left + border.right, height + border.top + border.bottom
    if most is not None and max(wide, high) > most:
        raise UserError(f"--extend: makes {wide}x{high} pixels: the model draws at most {most} a side; extend it less")
    if wide * high > pixels:
        side = math.isqrt(pixels)
        raise UserError(f"--extend: makes {wide}x{high} pixels: expected at most {pixels}, such as {side}x{side}")


def extend(image: Image, mask: Image | None, border: Border) -> tuple[Image, Image]:
    """The canvas with the image on it, and the mask of what is to be drawn: the border, and what `mask` marks."""
    from PIL import Image as Images

    size = image.width + border.left + border.right, image.height + border.top + border.bottom
    canvas, area = Images.new("RGB", size), Images.new("L", size, 255)
    canvas.paste(image, border[:2])
    area.paste(Images.new("L", image.size, 0) if mask is None else mask, border[:2])
    return continued(canvas, (*border[:2], border.left + image.width, border.top + image.height)), area


def continued(canvas: Image, box: tuple[int, int, int, int]) -> Image:
    """A canvas whose colours at the edges of a box (left, top, right, bottom) go on to its own edges."""
    import numpy as np
    from PIL import Image as Images

    left, top, right, bottom = box
    around = ((top, canvas.height - bottom), (left, canvas.width - right), (0, 0))
    return Images.fromarray(np.pad(np.asarray(canvas.crop(box)), around, mode="edge"))


def filled(image: Image, blank: Image) -> Image:
    """An image that is transparent where `blank` is light, with the border of that kind filled as `extend` does it."""
    from gtl.generate.edit import HALF

    box = blank.point(lambda value: 0 if value >= HALF else 255).getbbox()
    return image if box is None else continued(image, box)
