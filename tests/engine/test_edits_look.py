"""What a run shows of a model that learns to edit: rows of an image, what becomes of it, and what was to."""

from pathlib import Path

import torch

from gtl.config import parse_recipe
from gtl.data.scenes.sets import SceneSet
from gtl.families import open_family
from gtl.generate.pixels import pixels_of
from gtl.images import decode, read_recipe
from gtl.storage import Store
from gtl.train.assemble import assemble
from gtl.train.edits import Edits
from gtl.train.look import Pictures
from gtl.train.place import place
from gtl.types import Geometry, Item
from tests.engine.group import Group
from tests.engine.test_mirror import SIDE, cell

PAIRS = SceneSet(split="edits")


def items() -> list[Item]:
    family = open_family("builtin:tiny")
    codec = family.load("vae", torch.float32)
    found = []
    for index in range(2):
        pair = torch.stack([pixels_of(PAIRS.before(index)), pixels_of(PAIRS.picture(index)[0])]) * 2 - 1
        with torch.no_grad():
            moments = family.encode_images(codec, pair)  # type: ignore[attr-defined]
        old, new = ({name: value[side] for name, value in moments.items()} for side in (0, 1))
        geometry = Geometry((SIDE, SIDE), (0, 0), (SIDE, SIDE))
        found.append(Item(new, {}, {}, geometry, PAIRS.caption(index), original=old))
    return found


def drawn(folder: Path) -> list[str]:
    recipe = parse_recipe({
        "model": {"source": "builtin:tiny"}, "objective": {"type": "instruct"}, "data": {"source": str(folder)},
        "evaluate": {"steps": 3},
    })  # fmt: skip
    trainee = assemble(recipe, "fp32")
    for part in trainee.parts.values():
        place(part, torch.float32, "cpu")
    parts = trainee.parts | {"text_encoder": trainee.family.load("text_encoder", torch.float32)}

    class Here(Pictures):
        def encoded(self, prompts: object) -> None:
            return None

    how = Here(recipe.at_looks, "model", trainee, None, torch.device("cpu"), torch.float32)  # type: ignore[arg-type]
    run = Store(folder / "run")
    Edits(how, items()).draw(how.parts() | parts, run, 7)
    return [key for key, _, _ in run.list()]


def test_an_image_what_becomes_of_it_and_what_was_to(solo: Group, tmp_path: Path) -> None:
    assert solo.run(drawn, tmp_path) == [["samples/00000007.png"]]
    sheet = decode(tmp_path / "run" / "samples" / "00000007.png")
    assert sheet.size == (3 * SIDE, 2 * SIDE)
    assert read_recipe(tmp_path / "run" / "samples" / "00000007.png")["prompts"] == [PAIRS.caption(0), PAIRS.caption(1)]
    for row in range(2):
        for column, image in ((0, PAIRS.before(row)), (2, PAIRS.picture(row)[0])):
            assert (cell(sheet, row, column) - pixels_of(image) * 255).abs().mean() < 5, "as the codec gives it back"
        assert (cell(sheet, row, 1) - cell(sheet, row, 0)).abs().float().mean() > 1
