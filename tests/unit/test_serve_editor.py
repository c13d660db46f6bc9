"""Edits at the endpoint: an adapter that was taught to edit gets a picture to edit or is refused; such an adapter, and
an inversion, draw what `gtl edit` draws, beside requests that know nothing of them."""

import asyncio
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gtl.adapters import Registry
from gtl.families import open_family
from gtl.generate.colours import palette_of
from gtl.generate.edit import Edit as Start
from gtl.generate.edit_command import run
from gtl.images import read_recipe
from serve.catalog import Catalog
from serve.errors import ApiError
from serve.generator import Generator
from serve.order import Order
from serve.schema import Adapter, Drawing, Edit, Generation, Limits
from serve.settings import Base, Settings
from serve.uploads import Uploads, begin
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

    for found in (edited, again):
        assert away(found, Image.open(file)) <= 1
    assert away(plain, styled) > 3 and away(plain, edited) > 3


def away(one: Image.Image, other: Image.Image) -> float:
    return float(np.abs(np.asarray(one).astype(int) - np.asarray(other)).max())


@pytest.mark.parametrize("adapters", [(), ("style",)])
def test_an_inversion_is_that_of_the_command(
    registry: Registry, base: Base, sd: Path, tmp_path: Path, adapters: tuple[str, ...]
) -> None:
    """In the colours of another picture; the way up goes with the adapter that is asked for, as the way down does."""
    generator = Generator(base.model_dump(mode="json"), registry.store.root, 1)
    picture().save(tmp_path / "photo.png")
    Image.new("RGB", (9, 5), (40, 90, 200)).save(tmp_path / "blue.png")
    asked = Edit(prompt="a dog", strength=0.6, invert="a cat")
    sent = Uploads((tmp_path / "photo.png").read_bytes(), colors_of=(tmp_path / "blue.png").read_bytes())
    start, size = begin(asked, sent, Limits(), open_family(str(sd)))

    async def draw(keep_prompt: bool) -> None:
        names = tuple((f"{name}@v1", 1.0) for name in adapters)
        order = Order("a dog", "", 3, 5, 3.0, size, names, edit=start, keep_prompt=keep_prompt)
        drawn = [each async for each in generator.draw(order)][-1]
        (tmp_path / "last.png").write_bytes(drawn.data)

    asyncio.run(draw(keep_prompt=True))
    (file,) = run(tmp_path / "photo.png", out=tmp_path / "out", model=str(sd), adapters=adapters, prompt="a dog",
                  registry=registry.store.root, seed=3, steps=5, guidance=3.0, strength=0.6, invert="a cat",
                  colors_of=tmp_path / "blue.png")  # fmt: skip
    assert away(Image.open(tmp_path / "last.png"), Image.open(file)) <= 1
    told = read_recipe(tmp_path / "last.png")
    assert (told["strength"], told["invert"]) == (0.6, "a cat")
    assert told["palette"] == {name: list(value) for name, value in palette_of(Image.open(tmp_path / "blue.png"))
                               ._asdict().items()}  # fmt: skip
    asyncio.run(draw(keep_prompt=False))
    told = read_recipe(tmp_path / "last.png")
    assert "strength" in told and not {"invert", "prompt", "negative_prompt"} & set(told), "it is text of the client's"
