"""Image to image and inpainting of every family that denoises, against diffusers where it has a pipeline for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gtl.generate.edit import Edit, begin
from gtl.generate.engine import Engine
from gtl.generate.pixels import pixels_of, to_image
from gtl.generate.request import Request
from tests.contract.test_families import guidance_of
from tests.contract.test_flow import MODELS as FLOWS
from tests.contract.test_flow import SAME, Model, distance, request_of
from tests.tiny import as_asked, make_pixart, make_sdxl
from tests.unit.test_edit import picture, right_half
from tests.unit.test_generate import through
from tests.unit.test_inversion import up

MODELS: dict[str, Callable[[Path], Path]] = {"sdxl": make_sdxl, **FLOWS, "pixart": make_pixart}
TWINS = ("sdxl", "sd3", "sd35", "flux-dev", "flux-schnell", "qwen_image", "z_image")
"""Of which diffusers has a pipeline for both; its FLUX.2 reads the image beside the text, too."""

ROUNDED = 5e-3
"""Some schedulers round their times to whole ones."""


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(request.param, MODELS[request.param](tmp_path_factory.mktemp(request.param)))


def ours(model: Model, request: Request, edit: Edit) -> Tensor:
    engine = Engine(model.family, model.parts)
    engine.add(request, edit=edit)
    while len(engine):
        finished = engine.step()
    (drawn,) = engine.decode(finished)
    return drawn


def theirs(model: Model, request: Request, edit: Edit) -> Tensor:
    """What the family's pipeline for edits draws."""
    from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting

    kind = AutoPipelineForImage2Image if edit.mask is None else AutoPipelineForInpainting
    pipeline: Any = kind.from_pipe(model.pipeline)
    pipeline.set_progress_bar_config(disable=True)
    masked = {} if edit.mask is None else {"mask_image": edit.mask}
    # SDXL takes the size from the image.
    size = {} if model.name == "sdxl" else {"height": request.height, "width": request.width}
    # That of SD3 for masks forgets the shift of its latents when it decodes them.
    forgets = edit.mask is not None and model.family.name == "sd3"
    drawn: Tensor = pipeline(
        prompt=request.prompt, image=edit.image, **masked, **size, strength=edit.strength,
        **guidance_of(model.pipeline, request.guidance, request.negative_prompt), num_inference_steps=request.steps,
        generator=torch.Generator().manual_seed(request.seed), 
        output_type="latent" if forgets else "pt", **as_asked(pipeline),
    ).images  # fmt: skip
    with torch.no_grad():
        return ((model.family.decode(model.parts["vae"], drawn) / 2 + 0.5).clamp(0, 1) if forgets else drawn)[0]


@pytest.mark.parametrize("model", TWINS, indirect=True)
@pytest.mark.parametrize(("strength", "guidance", "size"), [(0.5, 3.5, (96, 64)), (1.0, 1.0, (64, 64))])
def test_image_to_image_is_that_of_the_pipeline(
    model: Model, strength: float, guidance: float, size: tuple[int, int]
) -> None:
    request, edit = request_of(model, size, guidance), Edit(picture(size[1], size[0]), strength=strength)
    expected = theirs(model, request, edit)
    assert distance(ours(model, request, edit), expected) < SAME
    assert expected.std() > 0.05


@pytest.mark.parametrize("model", TWINS, indirect=True)
@pytest.mark.parametrize(("strength", "guidance"), [(0.5, 3.5), (1.0, 1.0)])
def test_inpainting_is_that_of_the_pipeline(model: Model, strength: float, guidance: float) -> None:
    request, edit = request_of(model, (64, 64), guidance), Edit(picture(), right_half(), strength)
    drawn, expected = ours(model, request, edit), theirs(model, request, edit)
    assert distance(drawn[:, :, 32:], expected[:, :, 32:]) < SAME
    assert torch.allclose(drawn[:, :, :32], pixels_of(edit.image)[:, :, :32], atol=1e-6)


@pytest.mark.parametrize("is_masked", [False, True])
def test_it_begins_on_the_path_of_the_model(model: Model, is_masked: bool) -> None:
    """The share of noise is that of the time at which it begins; 3 of 5 steps are left."""
    family, request = model.family, request_of(model, (64, 96), 1.0)
    engine = Engine(family, model.parts)
    edit = engine.encode(Edit(picture(96, 64), right_half(96, 64) if is_masked else None, 0.6), request)
    assert edit.moments is not None
    scheduler = family.sampler(request.steps, request.height, request.width)
    cpu = torch.device("cpu")
    start = begin(edit, request, family, scheduler, torch.Generator().manual_seed(7), cpu)
    assert start.first == 2
    rng = torch.Generator().manual_seed(7)
    shape = (1, *family.latent_shape(64, 96))
    drawn, noise = (torch.randn(shape, generator=rng) for _ in range(2))
    clean, t = family.sample_latents(edit.moments, drawn), scheduler.timesteps[2]

    def as_read(latents: Tensor, time: Tensor) -> Tensor:
        return scheduler.scale_model_input(latents, time) if hasattr(scheduler, "scale_model_input") else latents

    expected = family.path.add_noise(clean, noise, whole(family, t))
    torch.testing.assert_close(as_read(start.latents, t), expected, atol=ROUNDED, rtol=0)
    if not is_masked:
        assert start.kept is None
        return
    assert start.kept is not None
    scheduler.step(torch.zeros(shape), t, start.latents, return_dict=False)
    t = scheduler.timesteps[3]
    back = start.kept.put_back(torch.full(shape, 9.0), scheduler, t)
    left = shape[-1] // 2  # 48 of 96 pixels: a column of large latents that is half in the mask is drawn anew
    assert (back[..., left:] == 9).all()
    there = family.path.add_noise(clean, noise, whole(family, t))
    torch.testing.assert_close(as_read(back, t)[..., :left], there[..., :left], atol=ROUNDED, rtol=0)
    last = start.kept.put_back(torch.full(shape, 9.0), scheduler, None)
    assert torch.equal(last[..., :left], clean[..., :left]) and (last[..., left:] == 9).all()


def whole(family: Any, t: Tensor) -> Tensor:
    """A scheduler's time, [1], as the path has them."""
    return t.view(1) if family.path.prediction == "flow" else t.view(1).long()


def test_what_is_kept_is_the_images_own(model: Model) -> None:
    request = request_of(model, (64, 64), 3.5)
    edit = Edit(picture(), right_half(), 0.6)
    drawn = to_image(ours(model, request, edit))
    left, right = (0, 0, 32, 64), (32, 0, 64, 64)
    assert drawn.crop(left).tobytes() == edit.image.crop(left).tobytes()
    assert drawn.crop(right).tobytes() != edit.image.crop(right).tobytes()


def test_inversion_goes_up_the_path_of_every_model(model: Model) -> None:
    request = request_of(model, (64, 64), 1.0)
    engine = Engine(model.family, model.parts)
    handle = engine.add(request, edit=Edit(picture(), strength=0.4, shows="a photo of a cat"))
    clean, inverted = up(engine, handle)
    assert inverted.shape == clean.shape and inverted.isfinite().all()
    assert not torch.equal(inverted, clean)
    (output,) = through(engine)
    assert output.latents.shape == clean.shape and not torch.equal(output.latents, inverted)
    (drawn,) = engine.decode([output])
    assert drawn.isfinite().all()
