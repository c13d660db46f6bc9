"""The safety checker: it judges as diffusers' own does, and nothing that it flags leaves as it is."""

import asyncio
import io
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops

from gtl.backbones.checker import open_checker
from gtl.generate.loop import EngineLoop
from gtl.images import read_recipe
from gtl.types import UserError
from serve.command import check, describe, read_config
from serve.errors import ApiError
from serve.generator import Mail
from serve.order import Drawn, Order
from serve.safety import Guard
from serve.settings import Safety
from tests.tiny import make_checker, make_sd, write_pictures
from tests.unit.test_residents import make_engine

ALWAYS, NEVER = -1.1, 1.1
ORDER = Order("a photo of a dog", "", 3, 6, 5.0, (64, 64), previews=2)


@pytest.fixture(scope="module")
def checkers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("checkers")
    make_checker(place / "always", [ALWAYS])
    make_checker(place / "never", [NEVER])
    return place


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineLoop]:
    loop = EngineLoop(make_engine(make_sd(tmp_path_factory.mktemp("sd"))))
    yield loop
    loop.close()


def pictures(place: Path) -> list[Image.Image]:
    write_pictures(place, [(48, 64), (64, 40), (32, 32), (100, 31)])
    return [Image.open(file).convert("RGB") for file in sorted(place.glob("*.png"))]


def judged(folder: Path, images: list[Image.Image]) -> list[bool]:
    """By diffusers' own code."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import AutoImageProcessor

    network = StableDiffusionSafetyChecker.from_pretrained(folder / "safety_checker").eval()
    processor = AutoImageProcessor.from_pretrained(folder / "feature_extractor", backend="pil")
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    return network(clip_input=pixels, images=torch.zeros(len(images), 3, 8, 8))[1]


def test_it_flags_what_diffusers_own_flags(tmp_path: Path) -> None:
    """At limits around a picture's own score, with and without special care, whose 0.01 is decisive for one."""
    images = pictures(tmp_path / "pictures")
    make_checker(tmp_path / "zero", [0.0])
    scores = [open_checker(str(tmp_path / "zero")).score(image) for image in images]
    limits = sorted(round(score + way, 3) for score in scores for way in (-0.004, 0.004, 0.012))
    verdicts = set()
    for number, limit in enumerate(limits):
        for care in (NEVER, ALWAYS):
            folder = make_checker(tmp_path / f"{number}{care}", [limit], [NEVER, care, NEVER])
            checker = open_checker(str(folder))
            found = [checker.is_flagged(image) for image in images]
            assert found == judged(folder, images), (limit, care)
            verdicts.add((number, tuple(found)))
    assert len(verdicts) > len(limits), "special care changed nothing: this compared too little"
    assert any(True in found for _, found in verdicts) and any(False in found for _, found in verdicts)


def test_a_threshold_moves_every_limit(tmp_path: Path) -> None:
    image = pictures(tmp_path / "pictures")[0]
    folder = str(make_checker(tmp_path / "checker", [0.0], inside=False))
    score = open_checker(folder).score(image)
    assert not open_checker(folder, score + 0.01).is_flagged(image)
    assert open_checker(folder, score - 0.01).is_flagged(image)


def test_a_picture_that_cannot_be_judged_is_flagged(checkers: Path) -> None:
    checker = open_checker(str(checkers / "never"))
    checker._network.visual_projection.weight.data.fill_(float("nan"))
    assert checker.is_flagged(Image.new("RGB", (8, 8)))


def draw(loop: EngineLoop, order: Order, safety: Safety | None) -> list[Drawn | Exception]:
    """Everything that the generator would hear of an order."""
    from gtl.generate.request import Request

    request = Request(order.prompt, 64, 64, order.negative_prompt, order.seed, order.steps, order.guidance)

    async def listen() -> list[Drawn | Exception]:
        mail = Mail(asyncio.get_running_loop(), order, request, None if safety is None else Guard(safety))
        loop.submit(request, mail, previews=order.previews)
        found = [await asyncio.wait_for(mail.events.get(), 60)]
        while isinstance(found[-1], Drawn) and found[-1].preview is not None:
            found.append(await asyncio.wait_for(mail.events.get(), 60))
        return found

    return asyncio.run(listen())


def test_what_is_not_flagged_leaves_as_it_is(loop: EngineLoop, checkers: Path) -> None:
    for action in ("refuse", "blur"):
        safety = Safety.model_validate({"checker": str(checkers / "never"), "action": action})
        expected, found = draw(loop, ORDER, None), draw(loop, ORDER, safety)
        assert [one.data for one in found] == [one.data for one in expected]  # type: ignore[union-attr]
        assert len(found) == 3 and not any(one.is_flagged for one in found)  # type: ignore[union-attr]


def test_refused_is_refused_with_its_previews(loop: EngineLoop, checkers: Path) -> None:
    (error,) = draw(loop, ORDER, Safety(checker=str(checkers / "always")))
    assert isinstance(error, ApiError)
    error = pickle.loads(pickle.dumps(error))
    assert (error.status_code, error.body()) == (400, {"error": {
        "message": "the picture was kept back by this server's safety check; another prompt or seed may pass",
        "type": "image_generation_user_error", "param": None, "code": "moderation_blocked",
    }})  # fmt: skip


@pytest.mark.parametrize("form", ["png", "webp", "jpeg"])
def test_blurred_is_blurred_with_its_previews(loop: EngineLoop, checkers: Path, tmp_path: Path, form: Any) -> None:
    """What leaves is what eight by eight colours can show."""
    order = replace(ORDER, output_format=form)
    found = draw(loop, order, Safety(checker=str(checkers / "always"), action="blur"))
    clear = draw(loop, order, None)
    assert [one.preview for one in found] == [0, 1, None]  # type: ignore[union-attr]
    for one, was in zip(found, clear, strict=True):
        assert isinstance(one, Drawn) and isinstance(was, Drawn) and one.is_flagged
        seen, original = (Image.open(io.BytesIO(each.data)).convert("RGB") for each in (one, was))
        expected = original.resize((8, 8), Image.Resampling.BOX).resize((64, 64), Image.Resampling.BICUBIC)
        away = 0 if form == "png" else 40
        assert max(high for _, high in ImageChops.difference(seen, expected).getextrema()) <= away
        assert max(high for _, high in ImageChops.difference(seen, original).getextrema()) > 60
    if form == "png":
        assert isinstance(found[-1], Drawn)
        (tmp_path / "x.png").write_bytes(found[-1].data)
        assert read_recipe(tmp_path / "x.png")["flagged"] is True


def test_a_checker_that_fails_lets_nothing_out(loop: EngineLoop, checkers: Path, monkeypatch: Any) -> None:
    """And says so without torch, which the ingress has not."""

    def fail(*_: Any) -> Any:
        raise torch.OutOfMemoryError("on the device")

    monkeypatch.setattr("gtl.backbones.checker.Checker.score", fail)
    (error,) = draw(loop, ORDER, Safety(checker=str(checkers / "never"), action="blur"))
    assert type(error) is RuntimeError and str(error) == "the safety checker failed: OutOfMemoryError"
    assert error.__cause__ is None


def damage(folder: Path, how: str) -> str:
    weights = folder / "safety_checker" / "model.safetensors"
    if how == "cut short":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif how == "no weights":
        weights.unlink()
    elif how == "no preprocessing":
        (folder / "feature_extractor" / "preprocessor_config.json").unlink()
    elif how == "of another kind":
        from safetensors.torch import load_file, save_file

        tensors = load_file(weights)
        del tensors["concept_embeds"]
        save_file(tensors, weights, {"format": "pt"})
    return str(folder)


@pytest.mark.parametrize(
    "how", ["cut short", "no weights", "no preprocessing", "of another kind", "missing", "nobody/x"]
)
def test_a_checker_that_cannot_be_loaded_is_found_before_anything_starts(tmp_path: Path, how: str) -> None:
    spec = how if "/" in how else str(tmp_path / "missing")
    if "/" not in how and how != "missing":
        spec = damage(make_checker(tmp_path / "checker", [NEVER]), how)
    config = read_config(None, [f"safety.checker={spec}", f"registry={tmp_path / 'registry'}"])
    with pytest.raises(UserError) as caught:
        check(config)
    assert str(caught.value).startswith(f"safety.checker: {spec}: ") and "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value) or "/" in how
    if how == "of another kind":
        assert "1 of its weights are missing or of another shape, the first is concept_embeds" in str(caught.value)


def test_a_good_checker_is_checked_too(tmp_path: Path, checkers: Path) -> None:
    config = read_config(None, [f"safety.checker={checkers / 'never'}", f"registry={tmp_path / 'registry'}"])
    assert describe(check(config)).startswith("tiny: builtin:tiny")
    with pytest.raises(UserError, match="safety.action"):
        read_config(None, [f"safety.checker={checkers / 'never'}", "safety.action=hide"])
