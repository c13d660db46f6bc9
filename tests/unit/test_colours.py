"""Colours of one picture brought to another's."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gtl.generate.colours import from_lab, match_colours, palette_of, to_lab
from gtl.generate.edit_command import run
from gtl.images import decode_canvas, read_recipe
from gtl.types import UserError
from tests.tiny import make_sd
from tests.unit.test_edit import picture, right_half


def statistics(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    lab = to_lab(np.asarray(image)).reshape(-1, 3)
    return lab.mean(0), lab.std(0)


def test_cielab_is_what_it_is_defined_as() -> None:
    """White, black, grey and the primaries, as tables of sRGB under D65 have them."""
    rgb = np.array([[255, 255, 255], [0, 0, 0], [119, 119, 119], [255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)
    expected = [[100, 0, 0], [0, 0, 0], [50.03, 0, 0], [53.24, 80.09, 67.20], [87.73, -86.18, 83.18],
                [32.30, 79.19, -107.86]]  # fmt: skip
    np.testing.assert_allclose(to_lab(rgb), expected, atol=0.05)
    every = np.stack(np.meshgrid(*[np.arange(0, 256, 5)] * 3), -1).astype(np.uint8)
    assert np.array_equal(from_lab(to_lab(every)), every)


def test_mean_and_deviation_become_the_others() -> None:
    rng = np.random.default_rng(0)
    image, reference = (
        Image.fromarray(rng.integers(low, high, (40, 30, 3)).astype(np.uint8)) for low, high in ((90, 120), (110, 170))
    )
    matched = match_colours(image, palette_of(reference))
    for found, wanted in zip(statistics(matched), statistics(reference), strict=True):
        np.testing.assert_allclose(found, wanted, atol=0.3)
    again = match_colours(matched, palette_of(reference))
    assert np.abs(np.asarray(again).astype(int) - np.asarray(matched)).max() <= 1


def test_the_colours_of_a_photograph_are_taken_band_by_band(monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 30, 3)).astype(np.uint8))
    monkeypatch.setattr("gtl.generate.colours.BAND", 120)
    for found, wanted in zip(palette_of(image), statistics(image), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-9)
    assert palette_of(image.resize((500, 1)))[0] != palette_of(image)[0], "wider than a band"


def test_what_is_transparent_has_no_colour(tmp_path: Path) -> None:
    photo = picture().convert("RGBA")
    photo.paste((200, 30, 30, 0), (0, 0, 32, 64))
    image, clear = decode_canvas(png(photo))
    assert clear is not None and palette_of(image, clear) == palette_of(picture().crop((32, 0, 64, 64)))
    nothing = tmp_path / "nothing.png"
    Image.new("RGBA", (3, 3), (9, 9, 9, 0)).save(nothing)
    picture().save(tmp_path / "photo.png")
    with pytest.raises(UserError) as error:
        run(tmp_path / "photo.png", out=tmp_path / "a", prompt="a dog", model="builtin:tiny", colors_of=nothing)
    assert str(error.value) == f"--colors-of {nothing}: all of it is transparent, and has no colours"


def png(image: Image.Image) -> bytes:
    sink = io.BytesIO()
    image.save(sink, "PNG")
    return sink.getvalue()


def test_one_colour_takes_the_mean_and_black_has_a_place() -> None:
    flat, dark = Image.new("RGB", (8, 8), (120, 130, 140)), Image.new("RGB", (5, 5), "black")
    assert match_colours(flat, palette_of(dark)).getcolors() == [(64, (0, 0, 0))]
    assert match_colours(dark, palette_of(flat)).getcolors() == [(25, (120, 130, 140))]


def test_only_the_area_changes() -> None:
    image, mask = picture(), right_half()
    matched = match_colours(image, palette_of(Image.new("RGB", (4, 4), "green")), mask)
    left, right = (0, 0, 32, 64), (32, 0, 64, 64)
    assert matched.crop(left).tobytes() == image.crop(left).tobytes()
    assert matched.crop(right).getcolors() == [(2048, (0, 128, 0))]
    assert match_colours(image, palette_of(mask), Image.new("L", image.size, 0)).tobytes() == image.tobytes()


def test_the_command_gives_what_it_draws_the_colours_of_a_picture(tmp_path: Path) -> None:
    sd = make_sd(tmp_path / "sd")
    picture().save(tmp_path / "photo.png")
    right_half().save(tmp_path / "mask.png")
    Image.new("RGB", (4, 4), "green").save(tmp_path / "green.png")
    options: dict[str, Any] = {"prompt": "a dog", "model": str(sd), "steps": 2, "mask": tmp_path / "mask.png"}
    (file,) = run(tmp_path / "photo.png", out=tmp_path / "a", colors_of=tmp_path / "green.png", **options)
    drawn = Image.open(file)
    assert drawn.crop((0, 0, 32, 64)).tobytes() == picture().crop((0, 0, 32, 64)).tobytes(), "what is kept stays"
    assert drawn.crop((32, 0, 64, 64)).getcolors() == [(2048, (0, 128, 0))]
    assert len(read_recipe(file)["edit"]["colors_of"]) == 64
    with pytest.raises(UserError, match=r"^--colors-of .*nowhere\.png: cannot be read: No such file"):
        run(tmp_path / "photo.png", out=tmp_path / "a", colors_of=tmp_path / "nowhere.png", **options)
