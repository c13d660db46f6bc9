"""Image to image and inpainting against diffusers' own pipelines, and among other requests."""

import pickle
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from gtl.families import open_family
from gtl.generate.edit import Edit, check_edit, finish, first_step
from gtl.generate.engine import Engine
from gtl.generate.images import generate, load_parts
from gtl.generate.loop import EngineLoop
from gtl.generate.pixels import pixels_of, to_image
from gtl.generate.request import Request, check
from gtl.types import UserError
from tests.tiny import make_sd
from tests.unit.test_engine_loop import Told
from tests.unit.test_generate import SCHEDULERS, drain, with_ddim, with_scheduler

DOG = Request("a photo of a dog", 64, 64, negative_prompt="blurry", seed=7, steps=6, guidance=6.0)
SAME = 1e-4


def picture(width: int = 64, height: int = 64) -> Image.Image:
    """Something with edges and slopes."""
    rows, columns = np.mgrid[:height, :width]
    image = Image.fromarray(np.stack([4 * rows, 2 * columns, 255 - 2 * rows], -1).clip(0, 255).astype(np.uint8))
    ImageDraw.Draw(image).ellipse((10, 14, 40, 50), fill="red")
    return image


def right_half(width: int = 64, height: int = 64) -> Image.Image:
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, (width // 2, 0, width, height))
    return mask


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sd(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def parts(sd: Path) -> dict[str, Any]:
    return load_parts(open_family(str(sd)), [], device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def pipelines(sd: Path) -> dict[str, Any]:
    import diffusers

    loaded = {name: getattr(diffusers, f"StableDiffusion{name}Pipeline") for name in ("Img2Img", "Inpaint")}
    opened = {name: kind.from_pretrained(sd) for name, kind in loaded.items()}
    for pipeline in opened.values():
        pipeline.set_progress_bar_config(disable=True)
    return opened


def plain(pipelines: dict[str, Any], folder: Path, request: Request, edit: Edit) -> Tensor:
    """What the diffusers pipeline draws, [3, H, W] in [0, 1]."""
    import json

    import diffusers

    pipeline = pipelines["Img2Img" if edit.mask is None else "Inpaint"]
    name = json.loads((folder / "model_index.json").read_text())["scheduler"][1]
    pipeline.scheduler = getattr(diffusers, name).from_pretrained(folder, subfolder="scheduler")
    size = {"height": request.height, "width": request.width, "mask_image": edit.mask} if edit.mask else {}
    drawn: Tensor = pipeline(
        request.prompt, image=edit.image, **size, strength=edit.strength, negative_prompt=request.negative_prompt,
        num_inference_steps=request.steps, guidance_scale=request.guidance, output_type="pt",
        generator=torch.Generator().manual_seed(request.seed),
    ).images[0]  # fmt: skip
    return drawn


def draw(engine: Engine, request: Request, edit: Edit | None = None) -> Tensor:
    handle = engine.add(request, edit=edit)
    return drain(engine)[handle]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize(
    ("strength", "change"), [(0.75, {}), (1.0, {}), (0.5, {"guidance": 1.0, "height": 96})], ids=["part", "all", "tall"]
)
def test_image_to_image_is_that_of_diffusers(
    sd: Path, parts: dict[str, Any], pipelines: dict[str, Any], tmp_path: Path, scheduler: str, strength: float,
    change: dict[str, Any],
) -> None:  # fmt: skip
    folder = with_scheduler(sd, tmp_path / "model", scheduler)
    request = replace(DOG, **change)
    edit = Edit(picture(request.width, request.height), strength=strength)
    drawn = draw(Engine(open_family(str(folder)), parts), request, edit)
    expected = plain(pipelines, folder, request, edit)
    assert (drawn - expected).abs().max() < SAME
    assert expected.std() > 0.05, "a flat picture compares nothing"
    assert (expected - draw(Engine(open_family(str(folder)), parts), request)).abs().mean() > 0.01


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize(("strength", "guidance"), [(0.75, 6.0), (1.0, 6.0), (0.5, 1.0)])
def test_inpainting_is_that_of_diffusers_and_keeps_the_rest_exactly(
    sd: Path, parts: dict[str, Any], pipelines: dict[str, Any], tmp_path: Path, scheduler: str, strength: float,
    guidance: float,
) -> None:  # fmt: skip
    folder = with_scheduler(sd, tmp_path / "model", scheduler)
    request = replace(DOG, guidance=guidance)
    edit = Edit(picture(), right_half(), strength)
    drawn = draw(Engine(open_family(str(folder)), parts), request, edit)
    expected = plain(pipelines, folder, request, edit)
    assert (drawn - expected)[:, :, 32:].abs().max() < SAME
    assert expected[:, :, 32:].std() > 0.05
    assert to_image(drawn).crop((0, 0, 32, 64)).tobytes() == edit.image.crop((0, 0, 32, 64)).tobytes()
    assert (drawn - pixels_of(edit.image))[:, :, 32:].abs().mean() > 0.01


def test_whatever_touches_a_line_is_drawn_anew(sd: Path, parts: dict[str, Any]) -> None:
    """A mask that is thinner than a latent is none in diffusers, where the picture comes back as it was decoded."""
    line = Image.new("L", (64, 64), 0)
    line.paste(255, (35, 0, 37, 64))
    engine = Engine(open_family(str(sd)), parts)
    image = picture()
    drawn, other = (draw(engine, replace(DOG, prompt=prompt), Edit(image, line)) for prompt in ("a dog", "a red house"))
    assert (drawn - other)[:, :, 35:37].abs().mean() > 0.01
    for each in (drawn, other):
        kept = to_image(each)
        kept.paste(image, None, line.point(lambda value: 255 - value))
        assert kept.tobytes() == to_image(each).tobytes()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_batch_of_edits_and_others_equals_each_alone(
    sd: Path, parts: dict[str, Any], tmp_path: Path, scheduler: str
) -> None:
    family = open_family(str(with_scheduler(sd, tmp_path / "model", scheduler)))
    rows: list[int] = []
    hook = parts["unet"].register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    wide = replace(DOG, width=96, seed=1)
    asked: list[tuple[Request, Edit | None]] = [
        (DOG, None),
        (replace(DOG, seed=11), Edit(picture(), strength=0.5)),
        (replace(DOG, prompt="a red house", steps=8), Edit(picture(), right_half(), 0.6)),
        (wide, Edit(picture(96), right_half(96), 0.9)),
        (wide, None),
    ]
    engine = Engine(family, parts)
    handles = [engine.add(request, edit=edit) for request, edit in asked]
    together = drain(engine)
    hook.remove()
    assert max(rows) == 6, "edits share a batch with what begins at noise"
    for handle, (request, edit) in zip(handles, asked, strict=True):
        assert (together[handle] - draw(Engine(family, parts), request, edit)).abs().max() < SAME


def test_it_takes_only_the_steps_behind_its_beginning(sd: Path, parts: dict[str, Any]) -> None:
    engine = Engine(open_family(str(with_ddim(sd))), parts)
    handle = engine.add(replace(DOG, steps=20), previews=(3, 6), edit=Edit(picture(), right_half(), 0.5))
    told = []
    while len(engine):
        done = engine.steps_done(handle)
        told += [(done + 1, output.preview, output) for output in engine.step()]
    assert [(step, preview) for step, preview, _ in told] == [(3, 0), (6, 1), (10, None)]
    for drawn in engine.decode([output for *_, output in told]):
        assert to_image(drawn).crop((0, 0, 32, 64)).tobytes() == picture().crop((0, 0, 32, 64)).tobytes()


def test_the_steps_that_are_left_are_those_of_diffusers() -> None:
    """Its pipelines round in two ways; an edit that is refused for having no step says how strong it has to be."""
    from types import SimpleNamespace

    from diffusers import StableDiffusion3Img2ImgPipeline, StableDiffusionImg2ImgPipeline

    pipelines = {"epsilon": StableDiffusionImg2ImgPipeline, "flow": StableDiffusion3Img2ImgPipeline}
    for prediction, pipeline in pipelines.items():
        path: Any = SimpleNamespace(prediction=prediction)
        for steps in range(1, 60):
            for hundredths in range(1, 101):
                scheduler = SimpleNamespace(timesteps=list(range(steps)), order=1)
                _, left = pipeline.get_timesteps(SimpleNamespace(scheduler=scheduler), steps, hundredths / 100, "cpu")
                assert steps - first_step(Edit(picture(), strength=hundredths / 100), steps, path) == left


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Edit(picture(), strength=0.0), "strength: 0: expected a number above 0 and up to 1"),
        (Edit(picture(), strength=1.01), "strength: 1.01: expected a number above 0 and up to 1"),
        (Edit(picture(), strength=float("nan")), "strength: nan: expected a number above 0 and up to 1"),
        (Edit(picture(), strength=0.1), "strength: 0.1: leaves none of 6 steps; expected at least 0.17"),
        (Edit(picture(96)), "image: 96x64: expected 64x64, what is drawn"),
        (Edit(picture(), right_half(32)), "mask: 32x64: expected 64x64, the image's size"),
        (
            Edit(picture(), Image.new("L", (64, 64), 127)),
            "mask: marks nothing; expected something to be drawn anew, or no mask",
        ),
    ],
)
def test_edits_that_cannot_be_begun_are_refused(sd: Path, parts: dict[str, Any], edit: Edit, message: str) -> None:
    engine = Engine(open_family(str(sd)), parts)
    for refuse in (lambda: engine.add(DOG, edit=edit), lambda: engine.encode(edit, DOG)):
        with pytest.raises(UserError) as error:
            refuse()
        assert str(error.value) == message
    with pytest.raises(UserError):
        next(generate(open_family(str(sd)), [DOG], edit=edit))
    assert len(engine) == 0


def test_the_least_strength_that_is_named_takes_a_step(sd: Path) -> None:
    family = open_family(str(sd))
    for steps in range(1, 300):
        request = replace(DOG, steps=steps)
        with pytest.raises(UserError) as error:
            check_edit(Edit(picture(), strength=1e-6), request, family)
        check_edit(Edit(picture(), strength=float(str(error.value).rpartition(" ")[2])), request, family)


def test_a_size_that_the_model_cannot_draw_is_the_requests_mistake(sd: Path) -> None:
    with pytest.raises(UserError, match=r"^width: 100: expected a multiple of 16, such as 96 or 112$"):
        check(replace(DOG, width=100), open_family(str(sd)), Edit(picture(100)))


def test_an_edit_travels() -> None:
    edit = Edit(picture(), right_half(), 0.4)
    sent = pickle.dumps(edit)
    there = pickle.loads(sent)
    assert (there.image, there.mask, there.strength, there.moments) == (edit.image, edit.mask, 0.4, None)
    assert len(sent) < 4 * 64 * 64 + 1000, "a byte a channel"


def test_an_image_is_encoded_once_for_many(sd: Path, parts: dict[str, Any]) -> None:
    encoded: list[int] = []
    hook = parts["vae"].encoder.register_forward_pre_hook(lambda module, args: encoded.append(len(args[0])))
    requests = [replace(DOG, seed=seed) for seed in range(3)]
    engine = Engine(open_family(str(sd)), parts)
    from gtl.generate.images import draw as draw_all

    images = dict(draw_all(engine, requests, edit=Edit(picture(), strength=0.5)))
    hook.remove()
    assert encoded == [1]
    assert len({image.tobytes() for image in images.values()}) == 3
    alone = draw(Engine(open_family(str(sd)), parts), requests[1], Edit(picture(), strength=0.5))
    assert np.abs(np.asarray(images[1]).astype(int) - np.asarray(to_image(alone))).max() <= 1


def test_what_a_mask_keeps_is_kept_in_every_value() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(16, 16)
    image = Image.fromarray(values.numpy()).convert("RGB")
    mask = Image.new("L", (16, 16), 0)
    mask.putpixel((0, 0), 255)
    pasted = to_image(finish(torch.ones(3, 16, 16), Edit(image, mask)))
    assert pasted.getpixel((0, 0)) == (255, 255, 255)
    pasted.putpixel((0, 0), (0, 0, 0))
    assert pasted.tobytes() == image.tobytes()


@pytest.fixture
def loop(sd: Path) -> Any:
    family = open_family(str(with_ddim(sd)))
    loop = EngineLoop(Engine(family, load_parts(family, [], device="cpu", dtype=torch.float32), max_batch=3))
    yield loop
    loop.close()


def test_edits_in_the_loop_are_drawn_among_others(loop: EngineLoop, sd: Path) -> None:
    edits = [None, Edit(picture(), strength=0.5), Edit(picture(), right_half(), 0.7), Edit(picture(), strength=1.0)]
    told = [Told() for _ in range(8)]
    for seed, each in enumerate(told):
        loop.submit(replace(DOG, seed=seed), each, edit=edits[seed % 4], previews=2)
    for seed, each in enumerate(told):
        drawn = np.asarray(each.wait()).astype(int)
        ((_, expected),) = generate(loop.engine.family, [replace(DOG, seed=seed)], edit=edits[seed % 4])
        assert np.abs(drawn - np.asarray(expected)).max() <= 1
        assert each.previews == [0, 1]
    assert loop.load() == (0, 0, 0.0)


def test_the_work_of_an_edit_is_that_of_the_steps_it_takes(loop: EngineLoop) -> None:
    before: list[float] = []
    go = threading.Event()

    def look(module: Any, args: Any) -> None:
        before.append(loop.load().work)
        go.wait(30)

    loop.engine.parts["unet"].register_forward_pre_hook(look)
    told = Told()
    loop.submit(replace(DOG, steps=20), told, edit=Edit(picture(), strength=0.5))
    go.set()
    told.wait()
    assert before == [float(left) for left in range(10, 0, -1)]


def test_the_image_is_encoded_where_it_holds_up_nobody(loop: EngineLoop) -> None:
    """While one image is encoded, and while nothing can be decoded, others take their steps."""
    encoding, go = threading.Event(), threading.Event()

    def hold(module: Any, args: Any) -> None:
        encoding.set()
        assert go.wait(60)

    hook = loop.engine.parts["vae"].encoder.register_forward_pre_hook(hold)
    edited, other = Told(), Told()
    loop.submit(DOG, edited, edit=Edit(picture(), strength=0.5))
    assert encoding.wait(60)
    ticket = loop.submit(replace(DOG, steps=40), other)
    while len(loop.steps) < 40:
        assert not edited.over.wait(0.01)
    assert loop.load().running == 0 and loop.load().waiting == 1
    go.set()
    hook.remove()
    edited.wait()
    other.wait()
    assert ticket.is_over


def test_an_edit_that_is_cancelled_while_it_is_read_is_not_drawn(loop: EngineLoop) -> None:
    encoding, go = threading.Event(), threading.Event()

    def hold(module: Any, args: Any) -> None:
        encoding.set()
        assert go.wait(60)

    loop.engine.parts["vae"].encoder.register_forward_pre_hook(hold)
    told, after = Told(), Told()
    ticket = loop.submit(DOG, told, edit=Edit(picture(), strength=0.5))
    assert encoding.wait(60)
    loop.cancel(ticket)
    go.set()
    while loop.load() != (0, 0, 0.0):
        time.sleep(0.01)
    loop.submit(DOG, after)
    after.wait()
    assert [step.rows for step in loop.steps] == [1] * DOG.steps and not told.over.is_set()


def test_what_is_wrong_with_an_edit_is_said_at_once(loop: EngineLoop) -> None:
    with pytest.raises(UserError, match="^strength: 2: expected"):
        loop.submit(DOG, Told(), edit=Edit(picture(), strength=2.0))
    assert loop.load() == (0, 0, 0.0)


def test_an_image_that_cannot_be_encoded_fails_alone(loop: EngineLoop) -> None:
    hook: Callable[..., Any] = lambda module, args: 1 / 0  # noqa: E731
    handle = loop.engine.parts["vae"].encoder.register_forward_pre_hook(hook)
    told, other = Told(), Told()
    loop.submit(DOG, told, edit=Edit(picture()))
    loop.submit(DOG, other)
    assert told.over.wait(60) and isinstance(told.errors[0], ZeroDivisionError)
    other.wait()
    handle.remove()


@pytest.mark.gpu
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_gpu_edits_the_same(sd: Path, parts: dict[str, Any], tmp_path: Path, scheduler: str) -> None:
    family = open_family(str(with_scheduler(sd, tmp_path / "model", scheduler)))
    there = load_parts(family, [], device="cuda", dtype=torch.float32)
    for edit in (Edit(picture(), strength=0.6), Edit(picture(), right_half(), 0.6)):
        drawn = draw(Engine(family, there, "cuda"), DOG, edit)
        assert (drawn - draw(Engine(family, parts), DOG, edit)).abs().mean() < 1 / 255
