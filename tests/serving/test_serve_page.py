"""The studio page in a real browser, before a really running endpoint with a tiny base and adapters for it."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from PIL import Image, ImageChops, ImageStat

from gtl.generate.colours import palette_of
from tests.pages import EVIL, contrast
from tests.studio import CONTRASTS, KEPT, LOW, NAMELESS, OBSERVE, PAINTED, WAIT_MS

pytest.importorskip("playwright", reason="playwright is not installed; it comes with the extra `dev`")
from playwright.sync_api import Browser, Page, Request, expect  # noqa: E402

PHONE, DESK = {"width": 375, "height": 800}, {"width": 1280, "height": 900}
POLICY = {
    "default-src 'self'", "img-src 'self' data: blob:", "object-src 'none'", "base-uri 'none'", "form-action 'none'",
    "frame-ancestors 'none'",
}  # fmt: skip
STEPS = "4"
SEED = "1234"

Visit = Callable[..., Page]


@pytest.fixture
def visit(browser: Browser, endpoint: str) -> Iterator[Visit]:
    """Opens the page as somebody who was never there. No error of its scripts and no foreign address is let pass."""
    contexts, troubles = [], []

    def visit(viewport: dict[str, int] = DESK, scheme: str = "dark") -> Page:
        context = browser.new_context(viewport=viewport, color_scheme=scheme, reduced_motion="reduce")
        contexts.append(context)
        context.set_default_timeout(WAIT_MS)
        page = context.new_page()
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", lambda line: troubles.append(line.text) if "Content Security" in line.text else None)
        page.on("dialog", lambda dialog: troubles.append(dialog.message))
        page.on("request", lambda one: one.url.startswith((endpoint, "data:", "blob:")) or troubles.append(one.url))
        page.goto(endpoint)
        expect(page.get_by_role("button", name="Generate")).to_be_enabled()
        return page

    yield visit
    for context in contexts:
        context.close()
    assert troubles == []


def make(page: Page, prompt: str = "a red circle", steps: str = STEPS, seed: str = SEED) -> list[dict[str, Any]]:
    """Fill in and generate; returns the requests that were sent when all pictures are there."""
    sent = []

    def note(request: Request) -> None:
        if request.url.endswith("/v1/images/generations"):
            sent.append(request.post_data_json)

    page.on("request", note)
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_label("Steps").fill(steps)
    page.get_by_role("spinbutton", name="Seed").fill(seed)
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#caption")).to_be_visible()
    page.remove_listener("request", note)
    return sent


def kept(page: Page) -> list[dict[str, Any]]:
    """What the browser's database holds, oldest first; blobs in base64."""
    return list(page.evaluate(KEPT))


def is_same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Up to two of 255 in a channel: sums of batches of other sizes are rounded in another order."""
    difference = ImageChops.difference(decoded(one["picture"]), decoded(other["picture"]))
    return max(high for _, high in difference.getextrema()) <= 2


def decoded(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_policy_forbids_what_is_inline_and_the_models_are_offered(visit: Visit, endpoint: str) -> None:
    page = visit()
    answer = page.request.get(endpoint)
    assert {part.strip() for part in answer.headers["content-security-policy"].split(";")} == POLICY
    assert page.locator("#model option").all_text_contents()[0] == "tiny"
    names = page.get_by_role("group", name="Adapters").get_by_role("button").all_text_contents()
    assert {"dog", "star"} <= set(names)


def test_nothing_in_the_files_is_inline_or_from_elsewhere(endpoint: str, visit: Visit) -> None:
    page = visit()
    html = page.request.get(endpoint).text()
    assert re.findall(r"<style|\sstyle=|\son[a-z]+=|<script(?![^>]*\ssrc=\"page/)", html) == []
    files = [path for path in Path("serve/page").iterdir() if path.suffix in (".html", ".css", ".js")]
    assert len(files) >= 3
    for file in files:
        text = file.read_text().replace("http://www.w3.org/2000/svg", "").replace("http:%2F%2Fwww.w3.org", "")
        assert re.findall(r"https?://[^'\s]*|innerHTML|insertAdjacentHTML|document\.write|eval\(", text) == [], file


def test_a_picture_is_previewed_kept_and_made_again(visit: Visit) -> None:
    page = visit()
    page.evaluate(OBSERVE)
    (sent,) = make(page)
    assert sent == {
        "model": "tiny", "prompt": "a red circle", "size": "auto", "seed": 1234, "num_inference_steps": 4,
        "output_format": "png", "stream": True, "partial_images": 3,
    }  # fmt: skip
    assert len(set(page.evaluate("window.seen"))) == 4  # three previews and the picture
    expect(page.locator("#gallery-count")).to_have_text("1 picture")
    expect(page.locator("#caption-facts")).to_contain_text("Seed1234")
    page.get_by_role("button", name="Same again").click()
    expect(page.locator("#gallery-count")).to_have_text("2 pictures")
    one, other = kept(page)
    assert one["size"] == f"{decoded(one['picture']).width}x{decoded(one['picture']).height}" == "64x64"
    assert is_same(one, other)


def test_change_one_thing_says_what_changed(visit: Visit) -> None:
    page = visit()
    make(page)
    page.get_by_label("Steps").fill("")
    page.get_by_label("Prompt", exact=True).fill("something else")
    page.get_by_role("spinbutton", name="Seed").fill("9")
    page.get_by_role("button", name="Change one thing").click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a red circle")
    expect(page.get_by_label("Steps")).to_have_value(STEPS)
    expect(page.get_by_role("spinbutton", name="Seed")).to_have_value(SEED)
    expect(page.locator("#origin p")).to_have_text("As in this picture. Change one thing.")
    page.get_by_label("Guidance").fill("3")
    expect(page.locator("#origin p")).to_have_text("Changed: guidance auto → 3")
    page.get_by_role("button", name="Roll a seed").click()
    expect(page.locator("#origin p")).to_have_text(
        re.compile(r"^Changed: guidance auto → 3, seed 1234 → (?!1234$)\d+$")
    )


def test_gallery_survives_a_reload_and_a_deleted_picture_comes_back(visit: Visit, tmp_path: Path) -> None:
    page = visit()
    make(page, "first")
    make(page, "second", seed="7")
    page.reload()
    expect(page.locator("#gallery-count")).to_have_text("2 pictures")
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("second")
    page.get_by_role("button", name="Open: first, seed 1234").click()
    expect(page.locator("#caption-prompt")).to_have_text("first")
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Download").click()
    waiting.value.save_as(tmp_path / "picture.png")
    assert waiting.value.suggested_filename == "first-1234.png"
    assert Image.open(tmp_path / "picture.png").size == (64, 64)
    page.get_by_role("button", name="Delete", exact=True).click()
    expect(page.locator("#gallery-count")).to_have_text("1 picture")
    assert [one["settings"]["prompt"] for one in kept(page)] == ["second"]
    page.get_by_role("button", name="Undo").click()
    expect(page.locator("#gallery-count")).to_have_text("2 pictures")
    assert [one["settings"]["prompt"] for one in kept(page)] == ["first", "second"]
    page.get_by_role("button", name="Delete", exact=True).click()
    expect(page.locator("#gallery-count")).to_have_text("1 picture")
    page.reload()
    expect(page.locator("#gallery-count")).to_have_text("1 picture")


def test_gallery_has_bounds_and_is_emptied(visit: Visit, endpoint: str) -> None:
    page = visit()
    beyond = f"""async ([number, bytes]) => {{
      const {{ beyondBounds }} = await import("{endpoint}/page/store.js");
      const thumbnail = {{ size: 0 }};
      const records = Array.from({{ length: number }}, (_, id) => ({{ id, picture: {{ size: bytes }}, thumbnail }}));
      return beyondBounds(records).map(({{ id }}) => id);
    }}"""
    assert page.evaluate(beyond, [120, 1000]) == []
    assert page.evaluate(beyond, [122, 1000]) == [120, 121]
    assert page.evaluate(beyond, [5, 60 * 2**20]) == [3, 4]
    make(page)
    page.evaluate("window.confirm = () => true")
    page.get_by_role("button", name="Delete all").click()
    expect(page.locator("#gallery")).to_be_hidden()
    expect(page.locator("#caption")).to_be_hidden()
    assert kept(page) == []


def test_adapters_have_scales_and_cards(visit: Visit) -> None:
    page = visit()
    page.get_by_role("button", name="Add dog").click()
    scale = page.get_by_role("slider", name="Scale of dog")
    expect(scale).to_be_focused()
    assert [scale.get_attribute(name) for name in ("min", "max", "step")] == ["0", "1.5", "0.05"]
    scale.press("ArrowLeft")
    scale.press("ArrowLeft")
    page.get_by_role("button", name="Card of dog").click()
    card = page.get_by_role("dialog", name="dog")
    expect(card).to_contain_text("lora")
    assert json.loads(page.locator("#card-json").text_content() or "")["name"] == "dog"
    page.keyboard.press("Escape")
    expect(card).to_be_hidden()
    (sent,) = make(page)
    assert sent["adapters"] == [{"name": "dog", "scale": 0.9}]
    expect(page.locator("#caption-facts")).to_contain_text("dog 0.90")
    page.get_by_role("button", name="Remove dog").click()
    assert "adapters" not in make(page)[0]
    with_dog, without = kept(page)
    assert not is_same(with_dog, without)


def test_two_mixes_at_one_seed_and_a_wipe_between_them(visit: Visit) -> None:
    page = visit()
    page.get_by_label("Compare", exact=True).check()
    page.get_by_role("group", name="A", exact=True).get_by_role("button", name="Add dog").click()
    page.get_by_role("group", name="B", exact=True).get_by_role("button", name="Add star").click()
    sent = make(page)
    assert sorted(one.pop("adapters")[0]["name"] for one in sent) == ["dog", "star"]
    assert sent[0] == sent[1]
    expect(page.locator("#tiles .tile")).to_have_count(2)
    assert page.locator("#tiles .label").all_text_contents() == ["A · dog 1.00", "B · star 1.00"]
    left, right = (page.locator("#tiles .tile").nth(index).bounding_box() for index in range(2))
    assert left and right and left["x"] + left["width"] <= right["x"]
    page.get_by_role("button", name="Wipe").click()
    wipe = page.get_by_role("slider", name="Wipe between A and B")
    wipe.fill("30")
    wipe.press("ArrowLeft")
    one, other = (page.locator("#tiles .tile").nth(index) for index in range(2))
    assert one.bounding_box() == other.bounding_box()
    expect(one).to_have_css("clip-path", "inset(0px 71% 0px 0px)")
    expect(other).to_have_css("clip-path", "inset(0px 0px 0px 29%)")


def test_several_pictures_have_seeds_in_a_row(visit: Visit) -> None:
    page = visit()
    page.get_by_label("Pictures", exact=True).select_option("4")
    sent = make(page)
    assert sorted(one["seed"] for one in sent) == [1234, 1235, 1236, 1237]
    expect(page.locator("#tiles .tile img")).to_have_count(4)
    page.locator("#tiles .tile").nth(2).click()
    expect(page.locator("#caption-facts")).to_contain_text("Seed1236")


def drawn(metrics: str) -> list[str]:
    return [line for line in metrics.splitlines() if line.startswith("gtl_pictures_total")]


def test_cancelling_ends_the_request_and_keeps_nothing(visit: Visit, endpoint: str) -> None:
    page = visit()
    before = drawn(page.request.get(f"{endpoint}/metrics").text())
    page.get_by_label("Prompt", exact=True).fill("slowly")
    page.get_by_label("Steps").fill("200")
    generate, cancel = (page.get_by_role("button", name=name) for name in ("Generate", "Cancel"))
    generate.press("Enter")
    expect(page.locator("#progress")).to_be_visible()
    expect(cancel).to_be_focused()
    with page.expect_event("requestfailed") as ended:
        cancel.press("Enter")
    assert ended.value.failure == "net::ERR_ABORTED"
    expect(page.locator(".tile .line")).to_have_text("Cancelled")
    expect(generate).to_be_focused()
    assert kept(page) == []
    idle = re.compile(r"^gtl_pictures_running\{.*\} 0\.0$", re.M)
    while not idle.search(told := page.request.get(f"{endpoint}/metrics").text()):
        page.wait_for_timeout(50)
    assert drawn(told) == before
    expect(page.locator("#error")).to_be_hidden()
    make(page)  # and the next one is made
    assert len(kept(page)) == 1


def test_what_the_endpoint_refuses_is_one_line_at_its_field(visit: Visit) -> None:
    page = visit()
    page.get_by_label("custom").check()
    page.get_by_label("Width").fill("4096")
    page.get_by_label("Height").fill("4096")
    page.get_by_label("Prompt", exact=True).fill("far too large")
    page.get_by_role("button", name="Generate").click()
    line = page.get_by_role("alert").filter(visible=True)
    expect(line).to_contain_text("size")
    assert "\n" not in line.inner_text() and len(line.inner_text()) < 300
    expect(page.locator("fieldset.sizes")).to_have_attribute("aria-invalid", "true")
    page.get_by_label("auto", exact=True).check()
    make(page)
    expect(line).to_have_count(0)
    expect(page.locator("fieldset.sizes")).not_to_have_attribute("aria-invalid", "true")


def test_a_size_that_a_base_does_not_draw_is_not_asked_for(visit: Visit) -> None:
    page, sent = visit(), []
    page.on("request", lambda request: sent.append(request.url) if request.method == "POST" else None)
    page.get_by_label("custom").check()
    expect(page.locator("#size-text")).to_have_text("up to 16384 pixels")
    page.get_by_label("Prompt", exact=True).fill("a red circle")
    line = page.get_by_role("alert").filter(visible=True)
    for width, height, told, requests in (
        ("136", "128", "size: 136x128 has 17408 pixels; tiny draws at most 16384", 0),
        ("24", "128", "expected a multiple of 16", 1),  # what the endpoint alone knows
    ):
        page.get_by_label("Width").fill(width)
        page.get_by_label("Height").fill(height)
        page.get_by_role("button", name="Generate").click()
        expect(line).to_contain_text(told)
        expect(page.locator("fieldset.sizes")).to_have_attribute("aria-invalid", "true")
        assert len(sent) == requests


def test_an_endpoint_that_is_gone_is_said(visit: Visit) -> None:
    page = visit()
    page.context.set_offline(True)
    page.get_by_label("Prompt", exact=True).fill("nobody there")
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("alert").filter(visible=True)).to_have_text("The endpoint does not answer.")


def test_text_is_never_html(visit: Visit) -> None:
    page = visit()
    elements = page.locator("script, style, [onerror]").count()
    make(page, EVIL)
    assert page.locator("#caption-prompt").text_content() == EVIL
    expect(page.get_by_role("button", name=f"Open: {EVIL}, seed {SEED}")).to_be_visible()
    assert page.locator("script, style, [onerror]").count() == elements


def photograph() -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(file, "PNG")
    return file.getvalue()


def moved(record: dict[str, Any], box: tuple[int, int, int, int]) -> float:
    """Mean difference between a picture and the image it began at, within a box, of 255."""
    pictures = (decoded(record[name]).convert("RGB").crop(box) for name in ("picture", "source"))
    return fmean(ImageStat.Stat(ImageChops.difference(*pictures)).mean)


def test_an_image_is_edited_where_it_is_painted(visit: Visit) -> None:
    page = visit()
    page.get_by_label("Edit", exact=True).check()
    page.get_by_label("Prompt", exact=True).fill("a red circle")
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("alert").filter(visible=True)).to_contain_text("image")
    page.locator("#image").set_input_files({"name": "a.txt", "mimeType": "image/png", "buffer": b"no image"})
    expect(page.get_by_role("alert").filter(visible=True)).to_contain_text("a.txt: not an image")
    page.locator("#image").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": photograph()})
    mask = page.get_by_role("application", name="Mask: paint what is to be repainted")
    mask.scroll_into_view_if_needed()
    box = mask.bounding_box()
    assert box
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=5)
    page.mouse.up()
    make(page)
    (record,) = kept(page)
    assert decoded(record["source"]).size == decoded(record["mask"]).size == (64, 64)
    alpha = decoded(record["mask"]).getchannel("A")
    assert [alpha.getpixel(place) for place in ((16, 32), (24, 32), (32, 32))] == [0, 0, 0]
    assert [alpha.getpixel(place) for place in ((4, 4), (60, 32), (24, 60))] == [255, 255, 255]
    expect(page.locator("#caption-facts")).to_contain_text("Strength0.80")
    page.get_by_role("button", name="Clear mask").click()
    page.get_by_role("button", name="Same again").click()  # with the mask that it had
    expect(page.locator("#gallery-count")).to_have_text("2 pictures")
    one, other = kept(page)
    assert is_same(one, other)
    assert decoded(other["mask"]).getchannel("A").getpixel((24, 32)) == 0
    assert moved(one, (0, 44, 64, 64)) == 0
    assert moved(one, (16, 30, 32, 34)) > 5


def test_an_image_that_is_described_is_inverted_and_keeps_its_colours(visit: Visit) -> None:
    page = visit()
    page.get_by_label("Edit", exact=True).check()
    page.locator("#image").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": photograph()})
    page.get_by_label("What it shows").fill("a grey wall")
    page.get_by_label("Keep its colours").check()
    make(page)
    expect(page.locator("#caption-facts")).to_contain_text("Image showsa grey wallColoursof the image")
    (record,) = kept(page)
    told = json.loads(decoded(record["picture"]).text["gtl"])  # type: ignore[attr-defined]
    assert (told["invert"], told["strength"]) == ("a grey wall", 0.8)
    mean, deviation = palette_of(decoded(record["picture"]))
    assert (*mean[1:], *deviation[1:]) == pytest.approx((0, 0, 0, 0), abs=1), "grey, as the image is"
    page.get_by_label("Keep its colours").uncheck()
    page.get_by_role("button", name="Same again").click()  # as it was made
    expect(page.locator("#gallery-count")).to_have_text("2 pictures")
    assert is_same(*kept(page)) and page.get_by_label("Keep its colours").is_checked()
    page.locator("#mask").press(" ")
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("alert").filter(visible=True)).to_contain_text("invert: keeps by itself what is not said")
    expect(page.get_by_label("What it shows")).to_have_attribute("aria-invalid", "true")


def test_a_mask_is_painted_with_keys_and_erased(visit: Visit) -> None:
    page = visit()
    page.get_by_label("Edit", exact=True).check()
    page.locator("#image").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": photograph()})
    mask = page.locator("#mask")
    expect(mask).to_be_visible()
    mask.press("ArrowRight")
    assert mask.evaluate(PAINTED) == 0
    mask.press(" ")
    once = mask.evaluate(PAINTED)
    assert once > 30
    for _ in range(10):
        mask.press("ArrowRight")
    mask.press(" ")
    assert mask.evaluate(PAINTED) > 1.5 * once
    page.get_by_label("Erase").check()
    mask.press(" ")
    assert mask.evaluate(PAINTED) == once


@pytest.mark.parametrize("scheme", ["dark", "light"])
@pytest.mark.parametrize("viewport", [PHONE, DESK], ids=["phone", "desk"])
def test_layout_and_contrast(visit: Visit, viewport: dict[str, int], scheme: str) -> None:
    page = visit(viewport, scheme)
    papers = {"dark": "rgb(18, 20, 23)", "light": "rgb(245, 243, 239)"}
    expect(page.locator("body")).to_have_css("background-color", papers[scheme])
    page.get_by_role("button", name="Add dog").click()
    make(page, "word" * 60)
    page.get_by_role("button", name="Change one thing").click()
    for mode in ("Create", "Compare", "Edit"):
        page.get_by_label(mode, exact=True).check()
        if mode == "Edit":
            page.locator("#image").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": photograph()})
            expect(page.locator("#mask")).to_be_visible()
        page.wait_for_timeout(400)  # until transitions are through
        assert page.evaluate("document.documentElement.scrollWidth") == viewport["width"]
        texts = page.evaluate(CONTRASTS)
        assert len(texts) > 30
        assert [text for text in texts if contrast(text[1], text[2]) < 4.5] == []
        assert page.evaluate(NAMELESS) == []
        assert page.evaluate(LOW) == []
    box = page.get_by_role("button", name="Generate").bounding_box()
    assert box and box["y"] + box["height"] <= viewport["height"]


def test_the_keyboard_is_enough(visit: Visit) -> None:
    page = visit()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the prompt")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.type("a red circle")
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a red circle")
    for _ in range(2):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_role("slider", name=re.compile("Scale of"))).to_be_focused()
    page.keyboard.press("Shift+Tab")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.get_by_label("Prompt", exact=True).press("Control+Enter")
    expect(page.locator("#caption")).to_be_visible()
