import asyncio
import base64
import io
import re
import struct
import zlib
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gtl.families import open_family
from gtl.generate.colours import palette_of
from gtl.generate.edit import Edit as Start
from gtl.generate.edit import choose_size, fit
from gtl.images import BrokenImage, decode, decode_mask
from serve.errors import ApiError, install
from serve.schema import Edit, Limits
from serve.uploads import Canvas, Uploads, begin, decode_uploads, from_base64, read_edit
from tests.endpoint import BASE

LIMITS = Limits()


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, pixels: bytes) -> bytes:
    """A PNG that claims a size, whatever its grey pixels are."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def mask(*alpha: int) -> Image.Image:
    """A mask of one row."""
    image = Image.new("RGBA", (len(alpha), 1), (200, 10, 10, 255))
    for x, value in enumerate(alpha):
        image.putpixel((x, 0), (200, 10, 10, value))
    return image


RED = Image.new("RGB", (3, 1), "red")
NOISE = Image.effect_noise((64, 48), 80).convert("RGB")


def row(image: Image.Image | None) -> list[Any]:
    assert image is not None
    return [image.getpixel((x, 0)) for x in range(image.width)]


def refusal(image: bytes, repaint: bytes | None = None, limits: Limits = LIMITS) -> tuple[int, str | None, str]:
    with pytest.raises(ApiError) as caught:
        decode_uploads(Uploads(image, repaint), limits)
    return caught.value.status_code, caught.value.param, caught.value.message


def test_an_edit_is_cut_where_it_is_known_how_large_it_is_drawn() -> None:
    """So that a large picture is not sent to a generator as it is, once for each that is drawn of it."""
    family, limits = open_family(BASE), Limits()
    wide = Image.effect_noise((3000, 2000), 80).convert("RGB")
    sent = Uploads(encoded(wide), encoded(Image.new("RGBA", wide.size, (0, 0, 0, 0))))
    whole = Start(wide, Image.new("L", wide.size, 255), 0.8)
    for asked, known, size in (
        (Edit(prompt="a dog", size="96x32"), None, (32, 96)),
        (Edit(prompt="a dog", size="96x32"), family, (32, 96)),
        (Edit(prompt="a dog"), family, choose_size(wide, family)),
    ):
        start, found = begin(asked, sent, limits, known)
        assert found == size and start.mask is not None
        assert start.image.tobytes() == fit(whole, *size).image.tobytes(), "as the generator would cut it"
        assert start.image.size == start.mask.size == (size[1], size[0])
    start, found = begin(Edit(prompt="a dog"), sent, limits, None)
    assert found is None and start.image.size == wide.size


def test_of_a_picture_of_colours_only_these_are_kept() -> None:
    sent = Uploads(encoded(RED), None, encoded(NOISE, "JPEG", quality=95))
    start, _ = begin(Edit(prompt="a dog", invert="a cat"), sent, LIMITS, None)
    assert (start.shows, start.palette) == ("a cat", palette_of(decode(sent.colors_of or b"")))
    assert begin(Edit(prompt="a dog"), Uploads(encoded(RED)), LIMITS, None)[0].palette is None
    for data, status, reason in (
        (b"text", 400, "no image in a known format (PNG, JPEG, WEBP)"), (encoded(NOISE)[:-40], 400, "damaged or cut"),
        (b"x" * (LIMITS.max_upload_bytes + 1), 413, "more than 20971520 bytes"),
        (encoded(Image.new("RGBA", (2, 2), (0, 0, 0, 0))), 400, "all of it is transparent, and has no colours"),
    ):  # fmt: skip
        with pytest.raises(ApiError) as caught:
            begin(Edit(prompt="a dog"), sent._replace(colors_of=data), LIMITS, None)
        assert (caught.value.status_code, caught.value.param) == (status, "colors_of")
        assert caught.value.message.startswith(f"colors_of: {reason}")


def test_a_picture_that_is_long_and_narrow_is_not_drawn_so() -> None:
    """No side is shorter than a model takes: it would have far more pixels than any that may be asked for."""
    line = Uploads(encoded(Image.new("RGB", (100_000, 1))), None)
    with pytest.raises(ApiError) as caught:
        begin(Edit(prompt="a dog"), line, Limits(), open_family(BASE), 16384)
    assert (caught.value.status_code, caught.value.param) == (400, "size")
    assert begin(Edit(prompt="a dog", size="64x64"), line, Limits(), open_family(BASE), 16384)[1] == (64, 64)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_picture_of_each_format_is_read(kind: str) -> None:
    found = decode_uploads(Uploads(encoded(NOISE, kind), None), LIMITS)
    assert (found.image.mode, found.image.size, found.mask) == ("RGB", (64, 48), None)
    if kind == "PNG":
        assert found.image.tobytes() == NOISE.tobytes()


def test_what_is_transparent_is_repainted() -> None:
    found = decode_uploads(Uploads(encoded(RED), encoded(mask(0, 255, 55))), LIMITS)
    assert found.mask is not None
    assert found.mask.mode == "L"
    assert row(found.mask) == [255, 0, 200]


def test_the_transparent_colour_of_a_palette_is_repainted() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    assert row(decode_mask(encoded(image, transparency=0))) == [255, 0]
    assert row(decode_mask(encoded(Image.merge("LA", [Image.new("L", (1, 1), 9), Image.new("L", (1, 1), 0)])))) == [255]


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "I;16"])
def test_without_transparency_the_white_is_repainted(mode: str) -> None:
    image = Image.new("L", (3, 1), 0)
    image.putpixel((1, 0), 255)
    if mode == "I;16":
        image = Image.frombytes("I;16", (3, 1), struct.pack("<3H", 0, 65535, 0))
    assert row(decode_mask(encoded(image.convert(mode) if mode != "I;16" else image))) == [0, 255, 0]


def test_a_mask_is_turned_as_its_picture_is() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture, repaint = encoded(RED, "JPEG", exif=exif), encoded(mask(0, 255, 255), exif=exif)
    found = decode_uploads(Uploads(picture, repaint), LIMITS)
    assert found.mask is not None
    assert found.image.size == found.mask.size == (1, 3)
    assert [found.mask.getpixel((0, y)) for y in range(3)] == [255, 0, 0]
    assert refusal(encoded(RED, exif=exif), encoded(mask(0, 0, 0)))[2] == (
        "mask: 3x1: should be of the image's size, 1x3"
    )


def test_a_mask_that_keeps_everything_is_refused() -> None:
    words = "mask: nothing in it is transparent, or white, so that nothing would change"
    assert refusal(encoded(RED), encoded(Image.new("RGBA", (3, 1), "black"))) == (400, "mask", words)
    assert refusal(encoded(RED), encoded(Image.new("L", (3, 1), 0))) == (400, "mask", words)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"text", "no image in a known format (PNG, JPEG, WEBP)"),
        (b"<svg></svg>", "no image in a known format (PNG, JPEG, WEBP)"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "no image in a known format (PNG, JPEG, WEBP)"),
        (encoded(RED, "GIF"), "no image in a known format (PNG, JPEG, WEBP)"),
        (encoded(RED, "TIFF"), "no image in a known format (PNG, JPEG, WEBP)"),
        (encoded(NOISE)[:-40], "damaged or cut short"),
        (encoded(NOISE, "JPEG")[:-40], "damaged or cut short"),
        (encoded(NOISE, "WEBP")[:-40], "damaged or cut short"),
        (encoded(NOISE)[:100] + b"\0" * 500 + encoded(NOISE)[600:], "damaged or cut short"),
        (png(50, 50, b"\0" * 10), "damaged or cut short"),
        (png(6400, 6400, b""), "6400x6400 pixels, more than the allowed 40000000"),
        (png(60000, 60000, b""), "more than the allowed 40000000 pixels"),
        (png(2**31 - 1, 2**31 - 1, b""), "more than the allowed 40000000 pixels"),
        (png(0, 5, b""), "no image in a known format (PNG, JPEG, WEBP)"),
    ],
)
def test_what_is_no_picture_is_refused_in_our_own_words(data: bytes, reason: str) -> None:
    assert refusal(data) == (400, "image", f"image: {reason}")


FILES = [encoded(NOISE), encoded(mask(0, 90, 255)), *(encoded(NOISE, kind, quality=40) for kind in ("JPEG", "WEBP"))]
WORDS = re.compile(
    r"image: (no image in a known format \(PNG, JPEG, WEBP\)|damaged or cut short|the file is empty"
    r"|(\d+x\d+ pixels, )?more than the allowed 40000000( pixels)?)"
)


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from(FILES),
    st.lists(st.tuples(st.integers(0, 4000), st.binary(min_size=1, max_size=4)), max_size=8),
    st.integers(0, 4000),
)
def test_whatever_is_wrong_with_a_file_is_told_in_our_own_words(
    data: bytes, damage: list[tuple[int, bytes]], length: int
) -> None:
    broken = bytearray(data[: len(data) - length % 100])
    for place, found in damage:
        place %= max(1, len(broken))  # a small one may be cut to nothing
        broken[place : place + len(found)] = found
    try:
        assert decode_uploads(Uploads(bytes(broken), None), LIMITS).image.mode == "RGB"
    except ApiError as error:
        assert WORDS.fullmatch(error.message), error.message


def test_a_mask_is_a_png() -> None:
    assert refusal(encoded(RED), encoded(RED, "JPEG")) == (400, "mask", "mask: no image in a known format (PNG)")


def test_bytes_and_pixels_are_bounded() -> None:
    data = encoded(NOISE)
    decode_uploads(Uploads(data, None), Limits(max_upload_bytes=len(data), max_upload_pixels=64 * 48))
    few = Limits(max_upload_bytes=len(data) - 1)
    assert refusal(data, None, few) == (413, "image", f"image: more than {len(data) - 1} bytes, which is the most")
    small = Limits(max_upload_pixels=64 * 48 - 1)
    assert refusal(data, None, small) == (400, "image", "image: 64x48 pixels, more than the allowed 3071")
    repaint = encoded(mask(0, 0, 0, 0))
    assert refusal(encoded(RED), repaint, Limits(max_upload_pixels=3))[1:] == (
        "mask", "mask: 4x1 pixels, more than the allowed 3",
    )  # fmt: skip


def test_many_pixels_in_few_bytes_are_not_decoded() -> None:
    bomb = png(40000, 40000, b"\0" * 50_000_000)
    assert len(bomb) < 100_000
    assert refusal(bomb) == (400, "image", "image: more than the allowed 40000000 pixels")
    with pytest.raises(BrokenImage, match="more than the allowed 100"):
        decode_mask(png(11, 10, b""), 100)


def test_base64_is_read_also_as_a_data_uri() -> None:
    text = base64.b64encode(b"abcd").decode()
    for form in (text, f"data:image/png;base64,{text}", f" {text[:3]}\n{text[3:]}\n"):
        assert from_base64(form, "image", 4) == b"abcd"
    for length in range(1, 40):
        text = base64.b64encode(b"x" * length).decode()
        assert len(from_base64(text, "image", length)) == length
        with pytest.raises(ApiError) as caught:
            from_base64(text, "image", length - 1)
        assert (caught.value.status_code, caught.value.param) == (413, "image")


@pytest.mark.parametrize(
    "text", ["/etc/passwd.png", "https://x/y.png", "file:///etc/passwd", "s3://b/k", "QQ", "ä", "*"]
)
def test_no_address_is_read(text: str) -> None:
    with pytest.raises(ApiError) as caught:
        from_base64(text, "image", 1000)
    assert (caught.value.status_code, caught.value.message) == (
        400, "image: should be a file, or its bytes in base64; no address is read",
    )  # fmt: skip


def make_client(limits: Limits) -> TestClient:
    app = FastAPI()
    install(app)

    @app.post("/v1/images/edits")
    async def edits(request: Request) -> list[Any]:
        edit, uploads = await read_edit(request, limits, urls=False)
        assert isinstance(edit, Edit)
        canvas: Canvas = await asyncio.to_thread(decode_uploads, uploads, limits)
        return [edit.prompt, edit.strength, canvas.image.size, canvas.mask and row(canvas.mask)]

    return TestClient(app, raise_server_exceptions=False)


def test_a_whole_request() -> None:
    client = make_client(LIMITS)
    files = {"image": encoded(RED), "mask": encoded(mask(0, 255, 255))}
    answer = client.post("/v1/images/edits", data={"prompt": "a dog", "strength": "0.5"}, files=files)
    assert answer.json() == ["a dog", 0.5, [3, 1], [255, 0, 0]]
    text = {name: base64.b64encode(data).decode() for name, data in files.items()}
    answer = client.post("/v1/images/edits", data={"prompt": "a dog"}, files={"image": files["image"]})
    assert answer.json() == ["a dog", 0.8, [3, 1], None]
    answer = client.post("/v1/images/edits", data={"prompt": "a dog", "mask": text["mask"]}, files=files)
    assert answer.json()["error"]["message"] == "mask: given twice; one file is taken"
    image = {"image": files["image"]}
    answer = client.post("/v1/images/edits", data={"prompt": "a dog", "mask": text["mask"]}, files=image)
    assert answer.json() == ["a dog", 0.8, [3, 1], [255, 0, 0]]


def test_a_mask_that_was_not_chosen_is_none() -> None:
    client = make_client(LIMITS)
    part = b'--x\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
    picture = part % (b"image", b'; filename="a.png"', encoded(RED))
    prompt = part % (b"prompt", b"", b"x")
    headers = {"content-type": "multipart/form-data; boundary=x"}
    for empty in (part % (b"mask", b'; filename=""', b""), part % (b"mask", b"", b"")):
        answer = client.post("/v1/images/edits", content=picture + prompt + empty + b"--x--\r\n", headers=headers)
        assert answer.json() == ["x", 0.8, [3, 1], None]
    empty = part % (b"mask", b'; filename="a.png"', b"")
    answer = client.post("/v1/images/edits", content=picture + prompt + empty + b"--x--\r\n", headers=headers)
    assert answer.json()["error"]["message"] == "mask: the file is empty"


def test_a_large_picture_comes_as_a_file_and_as_text() -> None:
    data = encoded(Image.effect_noise((900, 900), 90))
    assert len(data) > 500_000
    client = make_client(Limits(max_upload_bytes=len(data)))
    text = {"prompt": "a dog", "image": base64.b64encode(data).decode()}
    some_file = {"mask": encoded(Image.new("L", (900, 900), 255))}
    assert client.post("/v1/images/edits", data=text, files=some_file).json()[2] == [900, 900]
    assert client.post("/v1/images/edits", data={"prompt": "x"}, files={"image": data}).json()[2] == [900, 900]
    client = make_client(Limits(max_upload_bytes=len(data) - 1))
    for answer in (
        client.post("/v1/images/edits", data=text, files={"mask": b"x"}),
        client.post("/v1/images/edits", data={"prompt": "x"}, files={"image": data}),
    ):
        assert (answer.status_code, answer.json()["error"]["param"]) == (413, "image")


def test_a_request_without_a_picture() -> None:
    answer = make_client(LIMITS).post("/v1/images/edits", data={"prompt": "x"}, files={"mask": encoded(RED)})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["message"]) == (400, "image", "image: missing")
