import base64
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gtl.images import BrokenImage, decode, decode_mask, grid, preview, probe, read_recipe, save_png
from gtl.types import UserError


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def test_exif_orientation_is_applied() -> None:
    image = Image.new("RGB", (4, 2), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    data = encoded(image, exif=exif)
    upright = decode(data)
    assert upright.size == (2, 4)
    assert probe(data) == (4, 2)
    assert upright.getpixel((1, 0)) == (255, 255, 255)
    assert upright.getpixel((0, 0)) == (0, 0, 0)


def test_the_orientation_of_a_png_may_stand_behind_its_pixels() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.effect_noise((64, 32), 80), exif=exif)
    begin = data.index(b"eXIf") - 4
    length = 12 + int.from_bytes(data[begin : begin + 4], "big")
    chunk, rest = data[begin : begin + length], data[:begin] + data[begin + length :]
    assert probe(rest) == (32, 64)
    behind = rest[:-12] + chunk + rest[-12:]  # before IEND
    assert probe(behind) == (64, 32)
    assert decode(behind).size == (32, 64)
    with pytest.raises(BrokenImage):
        probe(behind[: len(behind) // 2])
    assert probe(data[: len(data) // 2]) == (64, 32)  # what the header says is believed


def test_transparency_goes_on_white() -> None:
    image = Image.new("RGBA", (3, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 255))
    image.putpixel((2, 0), (0, 0, 0, 128))
    found = decode(encoded(image))
    assert [found.getpixel((x, 0)) for x in range(3)] == [(255, 255, 255), (255, 0, 0), (127, 127, 127)]


def test_a_mask_is_what_is_transparent_or_else_what_is_light() -> None:
    clear = Image.new("RGBA", (3, 1), (255, 255, 255, 255))
    clear.putpixel((1, 0), (255, 255, 255, 0))
    clear.putpixel((2, 0), (255, 255, 255, 100))
    opaque = Image.new("RGBA", (3, 1), (0, 0, 0, 255))
    opaque.putpixel((1, 0), (255, 255, 255, 255))
    grey = Image.fromarray(np.array([[0, 65535, 257 * 200]], dtype=np.uint16))
    palette = Image.new("P", (3, 1))
    palette.putpalette([0, 0, 0, 255, 255, 255])
    palette.putpixel((1, 0), 1)
    expected = {
        "clear": (clear, [0, 255, 155]),
        "opaque": (opaque, [0, 255, 0]),
        "16 bits": (grey, [0, 255, 200]),
        "palette": (palette, [0, 255, 0]),
        "1 bit": (opaque.convert("1"), [0, 255, 0]),
    }
    for name, (image, values) in expected.items():
        found = decode_mask(encoded(image))
        assert (found.mode, list(found.tobytes())) == ("L", values), name
    with pytest.raises(BrokenImage, match="more than the allowed 2$"):
        decode_mask(encoded(clear), max_pixels=2)
    with pytest.raises(BrokenImage):
        decode_mask(encoded(clear)[:45])


def test_a_mask_is_turned_as_its_camera_was() -> None:
    image, exif = Image.new("L", (4, 2), 0), Image.Exif()
    image.putpixel((0, 0), 255)
    exif[0x0112] = 6
    found = decode_mask(encoded(image, exif=exif))
    assert found.size == (2, 4) and found.getpixel((1, 0)) == 255


def test_palette_with_transparency_goes_on_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    found = decode(encoded(image, transparency=0))
    assert [found.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (200, 100, 50)]


def test_grey_with_a_transparent_value_goes_on_white() -> None:
    image = Image.new("L", (2, 1), 7)
    image.putpixel((1, 0), 90)
    found = decode(encoded(image, transparency=7))
    assert [found.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (90, 90, 90)]


def test_grey_and_cmyk_become_rgb() -> None:
    assert decode(encoded(Image.new("L", (1, 1), 77))).getpixel((0, 0)) == (77, 77, 77)
    assert decode(encoded(Image.new("1", (1, 1), 1))).getpixel((0, 0)) == (255, 255, 255)
    assert decode(encoded(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "TIFF")).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_of_16_bits_is_scaled_and_not_clipped(kind: str) -> None:
    values = [0, 128, 257, 32768, 65279, 65535]
    image = Image.frombytes("I;16", (6, 1), struct.pack("<6H", *values))
    found = decode(encoded(image, kind))
    assert [found.getpixel((x, 0))[0] for x in range(6)] == [round(v / 257) for v in values]  # type: ignore[index]


def test_rgb_of_16_bits_is_scaled() -> None:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    pixel = zlib.compress(b"\0" + struct.pack(">3H", 65535, 32896, 0))
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixel) + chunk(b"IEND", b"")
    assert decode(data).getpixel((0, 0)) == (255, 128, 0)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_an_animation_gives_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (2, 2), color) for color in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert decode(data).getpixel((1, 1)) == (255, 0, 0)


def test_an_image_with_more_pixels_than_allowed_is_refused_from_its_header() -> None:
    data = encoded(Image.new("1", (100, 101)))
    assert decode(data, max_pixels=10100).size == (100, 101)
    for read in (decode, probe):
        with pytest.raises(BrokenImage, match="^100x101 pixels, more than the allowed 10099$"):
            read(data, max_pixels=10099)


def test_a_bomb_is_refused() -> None:
    with pytest.raises(BrokenImage, match="exceeds limit of 178956970 pixels"):
        decode(encoded(Image.new("1", (14000, 14000))))
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(BrokenImage, match="^12000x12000 pixels"):
        decode(encoded(Image.new("1", (12000, 12000))))


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def test_a_file_in_far_too_many_pieces_is_not_read_to_its_end() -> None:
    """A small picture with as many empty parts as fit into what may be uploaded, each read in Python."""
    noise = Image.effect_noise((640, 640), 80)
    png, jpeg = encoded(noise), encoded(noise, "JPEG")
    header, scan = 33, jpeg.index(b"\xff\xda")
    for data in (
        png[:header] + chunk(b"abCd", b"") * 100_000 + png[header:],
        png[:header] + chunk(b"IDAT", b"") * 400_000 + png[header:],
        jpeg[:2] + b"\xff" * 300_000 + jpeg[2:],
        jpeg[:scan] + b"\xff\xfe\0\2" * 100_000 + jpeg[scan:],
    ):
        for read in (decode, decode_mask):
            with pytest.raises(BrokenImage, match="in too many pieces"):
                read(data)
    pixels = zlib.compress(zlib.decompress(b"".join(idats(png))))
    pieces = b"".join(chunk(b"IDAT", pixels[i : i + 64]) for i in range(0, len(pixels), 64))
    assert pieces.count(b"IDAT") > 1000
    small = png[:header] + pieces + chunk(b"IEND", b"")  # thousands of them, as some programs write
    assert decode(small).tobytes() == noise.convert("RGB").tobytes()


def idats(png: bytes) -> list[bytes]:
    """The pieces of a PNG's pixels."""
    found, at = [], 8
    while at < len(png):
        length = int.from_bytes(png[at : at + 4], "big")
        if png[at + 4 : at + 8] == b"IDAT":
            found.append(png[at + 8 : at + 8 + length])
        at += 12 + length
    return found


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_a_file_cut_short_is_refused(kind: str) -> None:
    data = encoded(Image.effect_noise((64, 64), 80).convert("RGB"), kind)
    assert decode(data).size == (64, 64)
    with pytest.raises(BrokenImage, match="."):
        decode(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"<svg></svg>", "no image in a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image in a known format"),
        (encoded(Image.new("F", (2, 2)), "TIFF"), "floating-point pixels"),
        (encoded(Image.new("I", (2, 2), 70000), "TIFF"), "32-bit pixels from 70000 to 70000"),
    ],
)
def test_what_is_no_usable_image_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BrokenImage, match=f"^{reason}"):
        decode(data)


def test_a_path_is_read_and_a_missing_one_is_no_broken_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(Image.new("RGB", (3, 2), "lime")))
    assert decode(tmp_path / "a.png").getpixel((2, 1)) == (0, 255, 0)
    with pytest.raises(FileNotFoundError):
        decode(tmp_path / "b.png")


def test_a_png_carries_its_recipe(tmp_path: Path) -> None:
    recipe = {"prompt": "ein Bär, 熊", "seed": 7, "adapters": [["a@1", 0.5]]}
    save_png(Image.new("RGB", (2, 2), "red"), tmp_path / "a.png", recipe)
    assert read_recipe(tmp_path / "a.png") == recipe
    assert decode(tmp_path / "a.png").getpixel((0, 0)) == (255, 0, 0)


def test_a_png_without_a_recipe_is_named(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png: holds no recipe"):
        read_recipe(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"text")
    with pytest.raises(UserError, match=r"b\.png: cannot be read as PNG"):
        read_recipe(tmp_path / "b.png")


def test_a_grid_puts_images_row_by_row() -> None:
    images = [Image.new("RGB", (2, 3), color) for color in ("red", "lime", "blue")]
    sheet = grid(images, columns=2)
    assert sheet.size == (4, 6)
    found = [sheet.getpixel(place) for place in ((0, 0), (2, 0), (0, 3), (2, 3))]
    assert found == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]


def test_labels_are_written_below_the_images() -> None:
    sheet = grid([Image.new("RGB", (40, 20), "red")] * 2, columns=2, labels=["", "dog"])
    assert sheet.size == (80, 36)
    below = [sheet.crop((x, 20, x + 40, 36)).getextrema()[0] for x in (0, 40)]
    assert below[0] == (255, 255)
    assert below[1][0] < 128


def test_a_preview_is_the_file_itself_where_that_is_small() -> None:
    small = encoded(Image.new("RGB", (64, 32), "red"))
    assert preview(small, 64) == (f"data:image/png;base64,{base64.b64encode(small).decode()}", 64)
    noise = encoded(Image.effect_noise((640, 640), 100))  # grey, not to be compressed
    for data, side, size in (
        (small, 32, (32, 16)),
        (encoded(Image.new("RGB", (64, 32), "red"), "WEBP"), 32, (32, 16)),
        (noise, 640, (640, 640)),
    ):
        uri, width = preview(data, side)
        kind, _, text = uri.partition(",")
        shrunk = base64.b64decode(text)
        assert (kind, width, decode(shrunk).size) == ("data:image/jpeg;base64", decode(data).width, size)
    assert len(shrunk) < len(noise)
    with pytest.raises(BrokenImage):
        preview(b"nothing", 64)
