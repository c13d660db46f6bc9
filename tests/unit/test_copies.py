"""A run on few images that draws these images again says so; one that draws something like them does not."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from gtl.config import parse_recipe
from gtl.families import open_family
from gtl.images import cells, grid, save_png
from gtl.storage import Store
from gtl.train.copies import FEW, copies, warn_of_copies


def picture(seed: int) -> Image.Image:
    """Coarse colours, 64 x 64."""
    values = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((64, 64), Image.Resampling.BICUBIC)


def test_copies_are_found_blurred_and_mirrored_and_new_pictures_are_none() -> None:
    trained = [picture(i) for i in range(5)]
    drawn = [
        picture(90), trained[3].filter(ImageFilter.GaussianBlur(2)), picture(91),
        trained[1].transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    ]  # fmt: skip
    assert copies(drawn, trained) == {1: 3, 3: 1}


def test_images_that_are_alike_themselves_make_no_copies() -> None:
    """Of a subject that is photographed again and again a new photograph is as near as they are to each other."""
    first = np.asarray(picture(0)).astype(int)
    rng = np.random.default_rng(1)

    def again() -> Image.Image:
        changed = first + rng.normal(0, 12, (6, 6, 3)).repeat(11, 0).repeat(11, 1)[:64, :64]
        return Image.fromarray(np.clip(changed, 0, 255).astype(np.uint8))

    trained, new = [again() for _ in range(12)], [again() for _ in range(4)]
    assert len(copies(new, trained)) < 2
    assert copies([trained[4]], trained) == {0: 4}


def test_a_grid_is_cut_into_its_pictures() -> None:
    pictures = [picture(i) for i in range(6)]
    assert [each.tobytes() for each in cells(grid(pictures, 4), 4, 6)] == [each.tobytes() for each in pictures]


@pytest.mark.parametrize(("repeats", "images", "warned"), [(True, 6, True), (False, 6, False), (True, FEW + 1, False)])
def test_a_run_warns_of_what_its_last_look_shows(tmp_path: Path, repeats: bool, images: int, warned: bool) -> None:
    (tmp_path / "images").mkdir()
    trained = [picture(i) for i in range(6)]
    for i, each in enumerate(trained):
        each.save(tmp_path / "images" / f"{i}.png")
    run = Store(tmp_path / "run")
    for step, shown in ((0, [picture(70 + i) for i in range(4)]), (9, trained[:4])):
        if repeats or step == 0:
            file = tmp_path / "grid.png"
            save_png(grid(shown, 4), file, {"prompts": list("abcd")})
            run.upload(file, f"samples/{step:08d}.png")
    recipe = parse_recipe({
        "model": {"source": "builtin:tiny"},
        "data": {"source": str(tmp_path / "images"), "resolution": 64, "captions": "template", "caption_template": "a"},
        "storage": {"cache": str(tmp_path / "cache")},
    })  # fmt: skip
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        warn_of_copies(recipe, open_family("builtin:tiny"), run, images)
    told = [str(one.message) for one in seen if "learned by heart" in str(one.message)]
    assert len(told) == warned
    if warned:
        assert told[0].startswith(
            "4 of 4 pictures of the last look are nearer to an image that was trained on (0.png, 1.png, 2.png) than "
        )
