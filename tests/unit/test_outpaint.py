"""Outpainting: the canvas and its mask, by `gtl edit` and as a client of the endpoint sends it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gtl.generate.edit_command import run
from gtl.generate.outpaint import Border, continued, extend, fitting, parse_border
from gtl.images import read_recipe
from gtl.types import UserError
from serve.schema import Edit, Limits
from serve.uploads import Uploads, begin
from tests.tiny import make_sd
from tests.unit.test_edit import picture
from tests.unit.test_serve_uploads import encoded


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sd(tmp_path_factory.mktemp("sd"))


@pytest.mark.parametrize(
    ("text", "expected"), [("16", (16, 16, 16, 16)), ("1,0,3,4", (1, 0, 3, 4)), (" 8 , 0,0,0", (8, 0, 0, 0))]
)
def test_a_border_is_four_numbers_or_one(text: str, expected: tuple[int, ...]) -> None:
    assert parse_border(text) == expected


@pytest.mark.parametrize("text", ["", "1,2", "1,2,3,4,5", "-8", "8,0,0,x", "1.5", "٣", "0", "0,0,0,0", "10000000"])
def test_what_is_no_border_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"^--extend: .*: (expected LEFT,TOP,RIGHT,BOTTOM|adds nothing)"):
        parse_border(text)


def test_the_side_that_grows_takes_what_the_model_needs() -> None:
    assert fitting(Border(0, 0, 16, 0), 64, 64, 16) == (0, 0, 16, 0)
    assert fitting(Border(0, 0, 10, 0), 64, 64, 16) == (0, 0, 16, 0)
    assert fitting(Border(10, 9, 0, 8), 64, 50, 16) == (16, 22, 0, 8)


def test_the_canvas_has_the_image_and_its_edges_go_on() -> None:
    image = picture(6, 4)
    canvas, area = extend(image, None, Border(1, 2, 3, 0))
    assert canvas.size == area.size == (10, 6)
    assert canvas.crop((1, 2, 7, 6)).tobytes() == image.tobytes()
    assert canvas.getpixel((0, 0)) == image.getpixel((0, 0)) and canvas.getpixel((9, 5)) == image.getpixel((5, 3))
    marked = np.asarray(area)
    assert (marked[2:, 1:7] == 0).all() and (marked == 255).sum() == 60 - 24
    _, both = extend(image, Image.new("L", image.size, 200), Border(1, 0, 0, 0))
    assert np.asarray(both)[:, 1:].min() == 200
    assert continued(canvas, (0, 0, 10, 6)).tobytes() == canvas.tobytes()


def test_it_draws_beyond_the_edges_and_keeps_the_image(sd: Path, tmp_path: Path) -> None:
    """The photo is larger than what the model draws by itself, and no multiple of what it needs."""
    photo = picture(72, 60)
    photo.save(tmp_path / "photo.png")
    (file,) = run(
        tmp_path / "photo.png", out=tmp_path / "out", prompt="a dog", model=str(sd), steps=3, extend="20,0,4,0"
    )
    drawn = Image.open(file)
    assert drawn.size == (96, 64), "20 + 72 + 4, and 4 more rows than the photo has"
    assert drawn.crop((20, 0, 92, 60)).tobytes() == photo.tobytes()
    border, _ = extend(photo, None, Border(20, 0, 4, 4))
    assert np.abs(np.asarray(drawn).astype(int) - np.asarray(border))[:, :20].mean() > 2
    assert read_recipe(file)["edit"]["extend"] == [20, 0, 4, 4]


def test_a_transparent_border_is_what_extending_gives(sd: Path, tmp_path: Path) -> None:
    """By the command and by the endpoint, whose clients know no other way."""
    photo = picture(48, 64)
    photo.save(tmp_path / "photo.png")
    framed = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    framed.paste(photo, (16, 0))
    framed.save(tmp_path / "framed.png")
    options: dict[str, Any] = {"prompt": "a dog", "model": str(sd), "steps": 2}
    extended = run(tmp_path / "photo.png", out=tmp_path / "a", extend="16,0,0,0", **options)
    assert (
        Image.open(run(tmp_path / "framed.png", out=tmp_path / "b", **options)[0]).tobytes()
        == Image.open(extended[0]).tobytes()
    )
    canvas, area = extend(photo, None, Border(16, 0, 0, 0))
    start, _ = begin(Edit(prompt="a dog", size="64x64"), Uploads(encoded(framed), None), Limits(), None)
    assert start.mask is not None
    assert (start.image.tobytes(), start.mask.tobytes()) == (canvas.tobytes(), area.tobytes())


def test_a_mask_that_is_sent_counts_before_the_transparency(sd: Path) -> None:
    framed = picture().convert("RGBA")
    framed.putalpha(Image.new("L", (64, 64), 0))
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 8, 8))
    start, _ = begin(Edit(prompt="a dog", size="64x64"), Uploads(encoded(framed), encoded(mask)), Limits(), None)
    assert start.mask is not None and np.asarray(start.mask).sum() == 255 * 64
    nearly = picture().convert("RGBA")
    nearly.putalpha(Image.new("L", (64, 64), 250))
    start, _ = begin(Edit(prompt="a dog", size="64x64"), Uploads(encoded(nearly), None), Limits(), None)
    assert start.mask is None, "what is hardly transparent is no mask"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extend": "a"}, "--extend: a: expected LEFT,TOP,RIGHT,BOTTOM in pixels, such as 128,0,128,0, or one number"),
        ({"extend": "16", "width": 64}, "--extend: 16: says how large the picture is; leave --width and --height out"),
        ({"extend": "99999"}, "--extend: makes 200064x200064 pixels: expected at most 134217728, such as 11585x11585"),
    ],
)
def test_it_names_what_is_wrong(sd: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    picture().save(tmp_path / "photo.png")
    with pytest.raises(UserError) as error:
        run(tmp_path / "photo.png", out=tmp_path / "out", prompt="a dog", model=str(sd), **options)
    assert str(error.value) == message
