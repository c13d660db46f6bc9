"""An adapter that was taught to edit, at the endpoint: it gets a picture to edit or is refused, and draws what `gtl
edit` draws, beside requests that know nothing of it."""

import asyncio
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gtl.adapters import Registry
from gtl.generate.edit import Edit as Start
from gtl.generate.edit_command import run
from gtl.images import read_recipe
from serve.catalog import Catalog
from serve.errors import ApiError
from serve.generator import Generator
from serve.order import Order
from serve.schema import Adapter, Drawing, Edit, Generation
from serve.settings import Base, Settings
from tests.contract.test_instruct import publish
from tests.tiny import make_sd
from tests.unit.test_edit import picture
from tests.unit.test_generate import with_ddim

BOTH = (Adapter(name="style"), Adapter(name="editor"))


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_ddim(make_sd(tmp_path_factory.mktemp("sd")))


@pytest.fixture(scope="module")
def registry(sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    registry = Registry(str(tmp_path_factory.mktemp("registry")))
    publish(sd, registry, "editor", edits=True)
    publish(sd, registry, "style", edits=False, seed=3)
    return registry


@pytest.fixture(scope="module")
def base(sd: Path) -> Base:
    return Base(name="tiny", source=str(sd), slots=2, max_rank=8, targets="all-linear+conv")


@pytest.mark.parametrize(
    ("asked", "param", "message"),
    [
        (Generation(prompt="make it red", model="tiny:editor"), "model", "model: editor@v1: was taught to edit"),
        (Generation(prompt="make it red", adapters=BOTH), "model", "model: style@v1, editor@v1: was"),
        (
            Edit(prompt="a dog", model="tiny:style", image_guidance_scale=2.0), "image_guidance_scale",
            "image_guidance_scale: 2: no adapter here was taught to edit; leave it out",
        ),
    ],
)  # fmt: skip
def test_it_has_a_picture_to_edit_or_is_refused(
    registry: Registry, base: Base, asked: Drawing, param: str, message: str
) -> None:
    catalog = Catalog(Settings(registry=registry.store.root, bases=(base,)))
    with pytest.raises(ApiError) as caught:
        catalog.settle(asked)
    assert (caught.value.status_code, caught.value.param) == (400, param)
    assert caught.value.message.startswith(message)


def test_it_says_that_it_shares_no_batch(registry: Registry, base: Base) -> None:
    catalog = Catalog(Settings(registry=registry.store.root, bases=(base,)))
    assert [catalog.model(f"tiny:{name}@v1").gtl.shares_batch for name in ("editor", "style")] == [False, True]
    chosen = catalog.settle(Edit(prompt="make it red", model="tiny:editor", image_guidance_scale=2.0))
    assert chosen.edits and not catalog.settle(Generation(prompt="a dog", model="tiny:style")).edits


def test_it_draws_what_the_command_draws_beside_others(registry: Registry, base: Base, tmp_path: Path) -> None:
    generator = Generator(base.model_dump(mode="json"), registry.store.root, 1)
    start = Start(picture(), image_guidance=2.0)

    async def draw(adapters: tuple[tuple[str, float], ...], edit: Start | None) -> Image.Image:
        order = Order("make it red", "", 3, 4, 6.0, (64, 64), adapters, edit=edit)
        drawn = [each async for each in generator.draw(order)][-1]
        (tmp_path / "last.png").write_bytes(drawn.data)
        return Image.open(io.BytesIO(drawn.data))

    async def all_of_them() -> list[Any]:
        asked = [((("editor@v1", 1.0),), start), ((), None), ((("style@v1", 1.0),), None)]
        found = await asyncio.gather(*(draw(*one) for one in asked))
        with pytest.raises(Exception, match="adapters: one was taught to edit an image that it is shown"):
            await draw((("editor@v1", 1.0),), None)
        return [*found, await draw((("editor@v1", 1.0),), start)]

    edited, plain, styled, again = asyncio.run(all_of_them())
    assert read_recipe(tmp_path / "last.png")["image_guidance"] == 2.0
    picture().save(tmp_path / "photo.png")
    (file,) = run(tmp_path / "photo.png", out=tmp_path / "out", adapters=["editor"], registry=registry.store.root,
                  prompt="make it red", seed=3, steps=4, guidance=6.0, image_guidance=2.0)  # fmt: skip

    def away(one: Image.Image, other: Image.Image) -> float:
        return float(np.abs(np.asarray(one).astype(int) - np.asarray(other)).max())

    for found in (edited, again):
        assert away(found, Image.open(file)) <= 1
    assert away(plain, styled) > 3 and away(plain, edited) > 3
