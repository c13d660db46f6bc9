"""What a run shows of a codec: rows that are the pictures, what it makes of them, and its latents one by one."""

from pathlib import Path

import torch
from PIL import Image

from gtl.config import parse_recipe
from gtl.families import open_family
from gtl.images import decode
from gtl.storage import Store
from gtl.train.assemble import assemble
from gtl.train.look import Pictures
from gtl.train.mirror import SHOWN, TRAVERSED, Mirror, traversal
from tests.engine.group import Group

SIDE = 64


def pixels() -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (SHOWN, 3, 4, 4), dtype=torch.uint8, generator=rng)
    return coarse.repeat_interleave(SIDE // 4, 2).repeat_interleave(SIDE // 4, 3)


def drawn(folder: Path) -> list[str]:
    recipe = parse_recipe({
        "model": {"source": "builtin:tiny"}, "tuner": {"type": "full", "train": ["vae"]},
        "objective": {"type": "autoencode"}, "data": {"source": str(folder)},
    })  # fmt: skip
    trainee = assemble(recipe, "fp32")
    trainee.parts["vae"].float()
    how = Pictures(recipe.at_looks, "model", trainee, None, torch.device("cpu"), torch.float32)  # type: ignore[arg-type]
    run = Store(folder / "run")
    with torch.no_grad():
        Mirror(how, pixels()).draw(how.parts(), run, 7)
    return [key for key, _, _ in run.list()]


def cell(sheet: Image.Image, row: int, column: int) -> torch.Tensor:
    import numpy as np

    box = (column * SIDE, row * SIDE, (column + 1) * SIDE, (row + 1) * SIDE)
    return torch.from_numpy(np.asarray(sheet.crop(box)).copy()).permute(2, 0, 1).int()


def test_pictures_their_reconstructions_and_a_row_for_each_latent(solo: Group, tmp_path: Path) -> None:
    assert solo.run(drawn, tmp_path) == [["samples/00000007.png"]]
    sheet = decode(tmp_path / "run" / "samples" / "00000007.png")
    assert sheet.size == (SHOWN * SIDE, (2 + TRAVERSED) * SIDE)
    given = pixels().int()
    family = open_family("builtin:tiny")
    codec = family.load("vae", torch.float32)
    with torch.no_grad():
        moments = family.encode_images(codec, pixels().float().div(127.5).sub(1))
        latents = family.sample_latents(moments, torch.zeros_like(moments["mean"]))
        again = ((family.decode(codec, latents) / 2 + 0.5).clamp(0, 1) * 255).round().int()
    for column in range(SHOWN):
        assert (cell(sheet, 0, column) - given[column]).abs().max() <= 1
        assert (cell(sheet, 1, column) - again[column]).abs().max() <= 1
    for row in range(2, 2 + TRAVERSED):
        assert (cell(sheet, row, SHOWN // 2) - again[0]).abs().max() <= 1, "the middle is the picture itself"
        ends = [(cell(sheet, row, column) - again[0]).abs().float().mean() for column in (0, SHOWN - 1)]
        assert min(ends) > 2


def test_a_traversal_moves_one_channel_by_what_pictures_differ_in_it() -> None:
    latents = torch.randn(5, 6, 2, 2, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 7).view(1, 6, 1, 1)
    moved = traversal(latents)
    assert len(moved) == 5 * TRAVERSED
    spread = latents.std((0, 2, 3), correction=0)
    order = spread.argsort(descending=True)[:TRAVERSED].tolist()
    for place, one in enumerate(moved):
        change = one - latents[0]
        channel, by = order[place // 5], (-2.0, -1.0, 0.0, 1.0, 2.0)[place % 5]
        torch.testing.assert_close(change[channel], (by * spread[channel]).expand(2, 2), rtol=1e-4, atol=1e-5)
        change[channel] = 0
        assert not change.any()
