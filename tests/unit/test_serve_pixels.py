"""How large a picture may be asked for: by what its model was made for, where no config says."""

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest

from gtl.families import open_family
from gtl.types import UserError
from serve.catalog import Catalog
from serve.errors import ApiError
from serve.generator import Generator, outward
from serve.order import Order
from serve.schema import Generation, Limits
from serve.settings import Base, Settings, most_pixels
from tests.endpoint import BASE


def catalog(folder: Path, source: str = BASE, limits: int | None = None, **base: Any) -> Catalog:
    values = {"registry": str(folder / "registry"), "limits": {"max_pixels": limits}}
    return Catalog(Settings.model_validate({**values, "bases": [{"name": "tiny", "source": source, **base}]}))


def allowed(catalog: Catalog, size: str) -> bool:
    try:
        catalog.settle(Generation(prompt="a dog", size=size))
    except ApiError as error:
        assert (error.status_code, error.param, error.code) == (400, "size", "invalid_value")
        return False
    return True


@pytest.mark.parametrize(
    ("own", "limit", "made_for", "most"),
    [
        (None, None, (64, 96), 4 * 64 * 96),
        (None, 100, (64, 64), 100),
        (100, None, (64, 64), 100),
        (200, 100, (64, 64), 100),
        (100, 200, None, 100),
        (10**7, None, (64, 64), 10**7),
        (None, None, None, None),
    ],
)
def test_the_nearest_that_is_said_counts(
    own: int | None, limit: int | None, made_for: tuple[int, int] | None, most: int | None
) -> None:
    base = Base(name="tiny", source=BASE, max_picture_pixels=own)
    assert most_pixels(base, Limits(max_pixels=limit), made_for) == most


def test_a_model_draws_twice_each_side_and_no_more(tmp_path: Path) -> None:
    found = catalog(tmp_path)
    assert [allowed(found, size) for size in ("auto", "128x128", "256x64", "144x128", "2048x2048")] == [
        True, True, True, False, False,
    ]  # fmt: skip
    with pytest.raises(ApiError) as caught:
        found.settle(Generation(prompt="a dog", size="144x128"))
    assert caught.value.message == "size: '144x128' has 18432 pixels: should be at most 16384"
    assert found.model("tiny").gtl.max_pixels == 16384


@pytest.mark.parametrize("options", [{"limits": 200 * 100}, {"max_picture_pixels": 200 * 100}])
def test_a_config_allows_more(tmp_path: Path, options: dict[str, int]) -> None:
    found = catalog(tmp_path, **options)
    assert [allowed(found, size) for size in ("200x100", "201x100")] == [True, False]
    assert found.model("tiny").gtl.max_pixels == 200 * 100


def test_a_model_in_a_bucket_is_known_by_its_configs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("GTL_CACHE", str(tmp_path / "cache"))
    bucket = tmp_path / "bucket"
    shutil.copytree(open_family(BASE).folder, bucket)
    found = catalog(tmp_path, f"file://{bucket}")
    assert found.model("tiny").gtl.max_pixels == 16384 and not allowed(found, "144x128")
    assert [path for path in (tmp_path / "cache").rglob("*.safetensors")] == []
    # One that is not to be had now is left to its generators.
    gone = catalog(tmp_path, f"file://{tmp_path}/nowhere")
    assert gone.model("tiny").gtl.max_pixels is None and allowed(gone, "2048x2048")
    assert "its size is not known here" in caplog.text


def test_what_a_file_format_cannot_hold_is_refused_and_does_not_end_the_generator(tmp_path: Path) -> None:
    """WebP holds 16383 pixels a side: what its encoder raises once ended the thread that draws."""
    base = Base(name="tiny", source=BASE, slots=1, max_rank=1).model_dump(mode="json")
    generator = Generator(base, str(tmp_path / "registry"), 1, None, 16_400 * 16)

    async def draw(**options: Any) -> int:
        order = Order("a dog", "", seed=1, steps=1, guidance=1.0, **options)
        return [len(drawn.data) async for drawn in generator.draw(order)][-1]

    with pytest.raises(ApiError, match="a side of 16400 pixels: should be at most 16383 for webp") as caught:
        asyncio.run(draw(size=(16, 16_400), output_format="webp"))
    assert (caught.value.status_code, caught.value.param) == (400, "size")
    with pytest.MonkeyPatch.context() as patch:  # and whatever else an encoder raises
        patch.setattr("serve.generator.check_sides", lambda *_: None)
        with pytest.raises(ValueError, match="16383"):
            asyncio.run(draw(size=(16, 16_400), output_format="webp"))
    generator.check_health()
    assert asyncio.run(draw(size=(64, 64), output_format="webp")) > 0


def test_torch_s_errors_stay_where_torch_is() -> None:
    """An ingress, which has none, would have to import it to read them."""
    import torch

    order = Order("a dog", "", seed=1, steps=1, guidance=1.0, size=None)
    told = outward(torch.OutOfMemoryError("CUDA out of memory"), order)
    assert isinstance(told, ApiError) and (told.status_code, told.param) == (400, "size")
    other = outward(torch.jit.Error("of its own kind"), order)
    assert type(other) is RuntimeError and "of its own kind" in str(other)
    assert outward(error := UserError("steps: 0"), order) is error


def test_a_generator_refuses_what_an_ingress_could_not_know(tmp_path: Path) -> None:
    def draw(generator: Generator, size: tuple[int, int]) -> int:
        async def first() -> int:
            async for drawn in generator.draw(Order("a dog", "", seed=1, steps=1, guidance=1.0, size=size)):
                return len(drawn.data)
            raise AssertionError("nothing was drawn")

        return asyncio.run(first())

    base = Base(name="tiny", source=BASE, slots=1, max_rank=1).model_dump(mode="json")
    for most, size, too_large in ((None, (128, 128), (128, 144)), (128 * 144, (128, 144), (144, 144))):
        generator = Generator(base, str(tmp_path / "registry"), 1, None, most)
        assert draw(generator, size) > 0
        with pytest.raises(ApiError, match="should be at most") as caught:
            draw(generator, too_large)
        assert caught.value.param == "size"
