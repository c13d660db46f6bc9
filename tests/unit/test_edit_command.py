"""`gtl edit`: pictures, their recipes, and what it says of what it cannot take."""

import hashlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

import gtl
from gtl.families import open_family
from gtl.generate.command import run as generate
from gtl.generate.edit import Edit, choose_size, fit
from gtl.generate.edit_command import run
from gtl.images import read_recipe
from gtl.types import UserError
from tests.tiny import make_sd
from tests.unit.test_edit import picture, right_half


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sd(tmp_path_factory.mktemp("sd"))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    picture().save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_it_writes_pictures_with_recipes_and_a_grid(sd: Path, photo: Path, tmp_path: Path) -> None:
    mask = tmp_path / "mask.png"
    right_half().save(mask)
    options: dict[str, Any] = {
        "prompt": "a dog", "model": str(sd), "mask": mask, "strength": 0.5, "seed": 3, "steps": 4, "count": 2,
        "negative_prompt": "blurry",
    }  # fmt: skip
    paths = gtl.edit(photo, out=tmp_path / "a", **options)
    assert [path.name for path in paths] == ["0000.png", "0001.png", "grid.png"]
    recipes = [read_recipe(path) for path in paths]
    hashes = {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in (("image", photo), ("mask", mask))}
    assert recipes[1] == {
        "prompt": "a dog",
        "negative_prompt": "blurry",
        "seed": 4,
        "steps": 4,
        "guidance": 7.5,
        "sampler": "model",
        "height": 64,
        "width": 64,
        "model": {
            "source": str(sd),
            "revision": None,
            "variant": None,
            "fingerprint": open_family(str(sd)).fingerprint(),
        },
        "adapters": [],
        "edit": {**hashes, "strength": 0.5},
        "dtype": "float32",
        "gtl": "0.1.0",
    }
    assert recipes[2]["edit"] == recipes[0]["edit"] and recipes[0]["seed"] == 3
    drawn = [Image.open(path) for path in paths]
    left = (0, 0, 32, 64)
    assert all(image.crop(left).tobytes() == picture().crop(left).tobytes() for image in drawn[:2])
    assert drawn[0].tobytes() != drawn[1].tobytes()
    again = run(photo, out=tmp_path / "b", **options)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in paths]


def test_a_mask_is_what_is_transparent_or_else_what_is_white(sd: Path, photo: Path, tmp_path: Path) -> None:
    white, clear = tmp_path / "white.png", tmp_path / "clear.png"
    right_half().convert("RGB").save(white)
    cut = picture().convert("RGBA")
    cut.putalpha(ImageOps.invert(right_half()))
    cut.save(clear)
    options: dict[str, Any] = {"prompt": "a dog", "model": str(sd), "steps": 2}
    drawn = [
        Image.open(run(photo, out=tmp_path / mask.stem, mask=mask, **options)[0]).tobytes() for mask in (white, clear)
    ]
    assert drawn[0] == drawn[1]


def test_less_strength_stays_closer(tmp_path: Path) -> None:
    """With a model that draws something."""
    model = "builtin:tiny"
    (photo,) = generate(out=tmp_path / "photo", prompt="a red circle on a blue background", model=model, steps=12)
    image = np.asarray(Image.open(photo)).astype(float)

    def away(strength: float) -> float:
        (file,) = run(
            photo, out=tmp_path / str(strength), prompt="a green square on a yellow background", model=model,
            strength=strength, steps=12,
        )  # fmt: skip
        return float(np.abs(np.asarray(Image.open(file)) - image).mean())

    near, middle, far = (away(strength) for strength in (0.1, 0.5, 1.0))
    assert near < 20 and near < middle / 2 < far / 3


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((512, 512), (512, 512)),
        ((640, 384), (640, 384)),
        ((500, 500), (512, 512)),
        ((100, 90), (128, 64)),
        ((10, 10), (64, 64)),
        ((1024, 1024), (512, 512)),
        ((4032, 3024), (576, 448)),
        ((4000, 40), (1024, 64)),
    ],
)
def test_a_size_fits_the_model(size: tuple[int, int], expected: tuple[int, int]) -> None:
    family: Any = SimpleNamespace(default_size=(512, 512), multiple=64, max_size=1024 + 32)
    assert choose_size(Image.new("RGB", (size[1], size[0])), family) == expected


def test_an_image_that_does_not_fit_is_resized_and_cut_with_its_mask(sd: Path, tmp_path: Path) -> None:
    size = (150, 61)
    whole = picture(*size).resize(size)
    assert fit(Edit(whole, None, 0.5), 61, 150).image is whole
    fitted = fit(Edit(whole, right_half(*size), 0.5), 64, 64)
    assert fitted.mask is not None and fitted.strength == 0.5
    assert fitted.image.size == fitted.mask.size == (64, 64)
    assert fitted.mask.crop((0, 0, 31, 64)).getextrema() == (0, 0)
    assert fitted.mask.crop((33, 0, 64, 64)).getextrema() == (255, 255)
    middle = whole.crop((45, 0, 106, 61)).resize((64, 64), Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(fitted.image).astype(int) - np.asarray(middle)).mean() < 3
    whole.save(tmp_path / "photo.png")
    (file,) = run(tmp_path / "photo.png", out=tmp_path / "out", prompt="a dog", model=str(sd), steps=2)
    assert Image.open(file).size == (96, 48), "no more pixels than the model's own 64x64"
    assert (read_recipe(file)["width"], read_recipe(file)["height"]) == (96, 48)
    (file,) = run(
        tmp_path / "photo.png", out=tmp_path / "out", prompt="a dog", model=str(sd), steps=2, width=160, height=64
    )
    assert Image.open(file).size == (160, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": None}, "--model: missing; give a model, or an --adapter whose card names its base"),
        ({"count": 0}, "--count: 0: expected 1 or more"),
        ({"strength": 0.0}, "--strength: 0: expected a number above 0 and up to 1"),
        ({"strength": 0.02}, "--strength: 0.02: leaves none of 25 steps; expected at least 0.04"),
        ({"steps": 0}, "--steps: 0: expected 1 to 999"),
        ({"width": 60}, "--width: 60: expected a multiple of 16, such as 48 or 64"),
        ({"mask": "half.png"}, "--mask half.png: 32x64: expected 64x64, the size of photo.png"),
        ({"mask": "black.png"}, "--mask: marks nothing; expected something to be drawn anew, or no mask"),
        ({"mask": "cut.png"}, "--mask cut.png: OSError: image file is truncated"),
        ({"image": "cut.png"}, "image cut.png: OSError: image file is truncated"),
        ({"image": "."}, "image .: cannot be read: Is a directory"),
    ],
)
def test_it_names_the_wrong_option(
    sd: Path, photo: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(photo.parent)
    Image.new("L", (32, 64), 255).save("half.png")
    Image.new("L", (64, 64), 0).save("black.png")
    Path("cut.png").write_bytes(photo.read_bytes()[:-200])
    arguments = {"image": "photo.png", "prompt": "a dog", "model": str(sd), "out": "out", **options}
    with pytest.raises(UserError) as error:
        run(**arguments)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    assert not list(Path().glob("out/*"))


def test_the_command_is_imported_without_torch() -> None:
    program = "import sys, gtl.generate.edit_command; print(sorted({'torch', 'ray', 'diffusers'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
