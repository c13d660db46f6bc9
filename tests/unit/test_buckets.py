import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gtl.data.buckets import Variant, bucket_sizes, choose_bucket, cover, cut, geometry, variant_key, variants
from gtl.types import Geometry, UserError


def test_sizes_of_512() -> None:
    assert bucket_sizes(512, 64) == (
        (384, 704), (448, 576), (512, 512), (576, 448), (704, 384),
    )  # fmt: skip


@given(st.sampled_from([(64, 8), (64, 16), (512, 8), (512, 64), (768, 64), (1024, 16), (1024, 64)]))
def test_sizes_are_multiples_of_about_the_area_and_not_too_narrow(case: tuple[int, int]) -> None:
    resolution, multiple = case
    sizes = bucket_sizes(resolution, multiple)
    assert (resolution, resolution) in sizes
    assert {(w, h) for h, w in sizes} == set(sizes)
    for height, width in sizes:
        assert height % multiple == width % multiple == 0
        assert abs(height * width / resolution**2 - 1) < 0.2
        assert 0.5 <= height / width <= 2


def test_one_bucket_for_squares_only() -> None:
    assert bucket_sizes(512, 8, max_aspect=1.0) == ((512, 512),)


def test_no_side_is_longer_than_the_model_takes() -> None:
    assert bucket_sizes(512, 64, max_size=640) == ((448, 576), (512, 512), (576, 448))
    assert bucket_sizes(512, 64, max_size=512) == ((512, 512),)
    with pytest.raises(UserError, match=r"^data\.resolution: 512: this model takes at most 448$"):
        bucket_sizes(512, 64, max_size=448)


def test_a_resolution_that_the_model_cannot_take_is_named() -> None:
    with pytest.raises(UserError, match=r"^data\.resolution: 500: .* multiple of 64, such as 448 or 512$"):
        bucket_sizes(500, 64)


def test_the_nearest_aspect_ratio_wins() -> None:
    sizes = bucket_sizes(512, 64)
    cases = [(1000, 1000), (3000, 4000), (4000, 3000), (9, 16), (100, 3000)]
    assert [choose_bucket(size, sizes) for size in cases] == [
        (512, 512), (448, 576), (576, 448), (384, 704), (384, 704),
    ]  # fmt: skip


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(0, 10**6), st.booleans())
def test_a_crop_is_inside_and_keeps_the_aspect_ratio(height: int, width: int, seed: int, flip: bool) -> None:
    bucket = choose_bucket((height, width), bucket_sizes(512, 64))
    resized = cover((height, width), bucket)
    assert resized[0] >= bucket[0] and resized[1] >= bucket[1]
    assert resized[0] == bucket[0] or resized[1] == bucket[1]
    # Rounding to whole pixels is the only distortion.
    assert abs(resized[0] * width - resized[1] * height) <= max(height, width) / 2 + 1
    found = variants("hash", (height, width), bucket, crops=4, flip=flip, seed=seed)
    assert len(set(found)) == len(found)
    for top, left, _ in found:
        assert 0 <= top <= resized[0] - bucket[0]
        assert 0 <= left <= resized[1] - bucket[1]


def test_variants_begin_with_the_centre_and_repeat_nothing() -> None:
    assert variants("a", (64, 128), (64, 64)) == [Variant(0, 32, False)]
    assert variants("a", (64, 64), (64, 64), crops=5, flip=True) == [Variant(0, 0, False), Variant(0, 0, True)]
    some, other = (variants("a", (64, 640), (64, 64), crops=3, seed=seed) for seed in (0, 1))
    assert len(some) == 3
    assert some[0] == other[0] and some[1:] != other[1:]


def test_every_difference_changes_the_key() -> None:
    keys = {
        variant_key("a", (64, 64), Variant(0, 0, False)),
        variant_key("b", (64, 64), Variant(0, 0, False)),
        variant_key("a", (64, 72), Variant(0, 0, False)),
        variant_key("a", (64, 64), Variant(1, 0, False)),
        variant_key("a", (64, 64), Variant(0, 1, False)),
        variant_key("a", (64, 64), Variant(0, 0, True)),
    }
    assert len(keys) == 6
    assert variant_key("a", (64, 64), Variant(0, 0, False)) == variant_key("a", (64, 64), Variant(0, 0, False))


def test_geometry_counts_a_mirrored_crop_in_the_mirrored_image() -> None:
    assert geometry((64, 128), (64, 64), Variant(0, 10, False)) == Geometry((64, 128), (0, 10), (64, 64))
    assert geometry((64, 128), (64, 64), Variant(0, 10, True)) == Geometry((64, 128), (0, 54), (64, 64))


def test_cut_takes_the_asked_part_at_the_asked_scale() -> None:
    image = Image.new("RGB", (256, 128), "black")
    image.paste((255, 255, 255), (128, 0, 192, 128))  # after the resize by half: columns 64 to 96
    crop = cut(image, (64, 64), Variant(0, 32, False))
    row = [crop.getpixel((x, 32))[0] for x in range(64)]  # type: ignore[index]
    assert row[:28] == [0] * 28 and row[36:60] == [255] * 24
    mirrored = cut(image, (64, 64), Variant(0, 32, True))
    assert [mirrored.getpixel((63 - x, 32))[0] for x in range(64)] == row  # type: ignore[index]


@given(st.integers(1, 300), st.integers(1, 300))
def test_cut_takes_any_size(height: int, width: int) -> None:
    bucket = choose_bucket((height, width), bucket_sizes(64, 8))
    for variant in variants("a", (height, width), bucket, crops=3, flip=True):
        assert cut(Image.new("RGB", (width, height)), bucket, variant).size == (bucket[1], bucket[0])
