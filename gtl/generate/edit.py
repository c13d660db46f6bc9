"""Requests that begin at a picture: image to image, inpainting where a mask keeps a part of it as it is, and edits by
inversion, which begin at the noise that draws it.

A picture that is noised on its way keeps its rough shapes and gets new details (SDEdit, Meng et al. 2021, arXiv
2108.01073). What a mask keeps is put back, noised as far, after every step (Avrahami et al. 2022, arXiv 2206.02779).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from gtl.diffusion.solver import PASSES
from gtl.generate.pixels import pixels_of, to_image
from gtl.types import UserError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

    from gtl.diffusion.path import NoisePath
    from gtl.families.base import DiffusionFamily
    from gtl.generate.colours import Palette
    from gtl.generate.request import Request

STRENGTH, IMAGE_GUIDANCE = 0.8, 1.5
"""Where nobody says; the scale is the one that arXiv 2211.09800 recommends."""
HALF = 128
"""Mask values from here on are drawn anew."""


@dataclass(frozen=True, eq=False)
class Edit:
    """What a request begins at."""

    image: Image
    """RGB, of the request's size."""
    mask: Image | None = None
    """L, of the image's size: what is light is drawn anew, and the rest stays what it is in every pixel. None: all."""
    strength: float = STRENGTH
    """Share of the steps that are taken, above 0 and up to 1: how far the picture may go from the image."""
    image_guidance: float | None = None
    """Of a model that was taught to edit: it sees the image while it draws, from noise on, and this is the scale of its
    guidance by that, 1 is off. None: the model sees nothing."""
    shows: str | None = None
    """What is to be seen in the image: it is drawn from the noise that draws it with this prompt, unguided (as the
    baseline of Mokady et al. 2022, arXiv 2211.09794), so that what both prompts say stays. None: not so."""
    palette: Palette | None = None
    """Whose colours what is drawn gets, see `match_colours`; None: those that are drawn."""
    moments: Mapping[str, Tensor] | None = None
    """Of the image, by the codec of the model that draws, each [1, C, h, w]; None until they are needed."""


def first_step(edit: Edit | None, steps: int, path: NoisePath) -> int:
    """How many of the steps are left out at the noisy end; rounded as diffusers does it for each kind of path."""
    if edit is None or edit.image_guidance is not None:
        return 0
    if path.prediction == "flow" and edit.shows is None:
        return int(steps - steps * edit.strength)
    return steps - int(steps * edit.strength)


def looks_of(edit: Edit | None, steps: int) -> int:
    """Predictions that so many steps of a request take, those of the way up to its image's noise among them."""
    return steps if edit is None or edit.shows is None else steps * (1 + PASSES)


def check_edit(edit: Edit, request: Request, family: DiffusionFamily) -> None:
    """Refuse what cannot be begun at.

    Raises:
        UserError: names the field, its value and what is allowed.
    """
    if not 0 < edit.strength <= 1:
        raise UserError(f"strength: {edit.strength:g}: expected a number above 0 and up to 1")
    if edit.image_guidance is not None and not (math.isfinite(edit.image_guidance) and edit.image_guidance >= 1):
        raise UserError(f"image_guidance: {edit.image_guidance:g}: expected a number >= 1; 1 is no guidance")
    if first_step(edit, request.steps, family.path) >= request.steps:
        least = math.ceil(100 / request.steps) / 100
        raise UserError(f"strength: {edit.strength:g}: leaves none of {request.steps} steps; expected at least {least}")
    if edit.shows is not None:
        check_inversion(edit, request)
    if edit.image.size != (request.width, request.height):
        raise UserError(f"image: {size_text(edit.image)}: expected {request.width}x{request.height}, what is drawn")
    if edit.mask is None:
        return
    if edit.mask.size != edit.image.size:
        raise UserError(f"mask: {size_text(edit.mask)}: expected {size_text(edit.image)}, the image's size")
    if not repainted(edit.mask).any():
        raise UserError("mask: marks nothing; expected something to be drawn anew, or no mask")


def check_inversion(edit: Edit, request: Request) -> None:
    """Refuse what an inversion does not go together with.

    Raises:
        UserError: names it.
    """
    if edit.mask is not None:
        raise UserError(
            "invert: keeps by itself what is not said to change; it goes with no mask, and with nothing that is "
            "transparent or added"
        )
    if edit.image_guidance is not None:
        raise UserError("invert: an adapter that was taught to edit sees the image itself; take one of the two")
    if request.sampler != "model":
        raise UserError("invert: an adapter for few steps adds new noise at each; take one of the two")


def check_shown(edit: Edit | None, edits: bool) -> None:
    """Refuse to show an image to a model that sees none, and to draw without one where the model was taught to edit.

    Raises:
        UserError: so it is.
    """
    is_shown = edit is not None and edit.image_guidance is not None
    if edits and not is_shown:
        raise UserError("adapters: one was taught to edit an image that it is shown; it draws nothing without")
    if is_shown and not edits:
        raise UserError("image_guidance: no adapter here was taught to edit the image that it is shown; leave it out")


def marks(mask: Image) -> bool:
    """Whether it marks anything."""
    return any(mask.histogram()[HALF:])


def size_text(image: Image) -> str:
    """Width and height."""
    return f"{image.width}x{image.height}"


def choose_size(image: Image, family: DiffusionFamily) -> tuple[int, int]:
    """(height, width) to draw an image at: its own if that fits the model, else the nearest that does.

    One with more pixels than the model draws by itself is reduced to as many.
    """
    high, wide = family.default_size
    scale = min(1.0, math.sqrt(high * wide / (image.height * image.width)))
    most = math.inf if family.max_size is None else family.max_size // family.multiple

    def nearest(side: int) -> int:
        return int(min(most, max(1, round(side * scale / family.multiple)))) * family.multiple

    return nearest(image.height), nearest(image.width)


def fit(edit: Edit, height: int, width: int) -> Edit:
    """The same edit at another size, as training cuts its crops: resized until it covers, then cut at the centre."""
    from PIL import Image as Images
    from PIL import ImageOps

    def cut(image: Image, method: Images.Resampling) -> Image:
        return image if image.size == (width, height) else ImageOps.fit(image, (width, height), method)

    mask = None if edit.mask is None else cut(edit.mask, Images.Resampling.BILINEAR)
    return replace(edit, image=cut(edit.image, Images.Resampling.LANCZOS), mask=mask, moments=None)


def encode(edit: Edit, family: DiffusionFamily, codec: Any, device: torch.device) -> dict[str, Tensor]:
    """The codec's moments of the image, each [1, C, h, w], fp32."""
    pixels = pixels_of(edit.image).mul(2).sub(1).unsqueeze(0)
    return {name: value.float() for name, value in family.encode_images(codec, pixels.to(device)).items()}


def finish(picture: Tensor, edit: Edit) -> Tensor:
    """A picture [3, H, W] in [0, 1] in its colours, with what the mask keeps as it is in the image."""
    import torch

    from gtl.generate.colours import match_colours

    if edit.mask is not None:
        picture = torch.where(repainted(edit.mask), picture, pixels_of(edit.image))
    if edit.palette is None or picture.isnan().any():  # NaN is told by whoever asked, and has no colour
        return picture
    return pixels_of(match_colours(to_image(picture), edit.palette, edit.mask))


def repainted(mask: Image) -> Tensor:
    """What a mask marks, [1, H, W]."""
    import numpy as np
    import torch

    return torch.from_numpy(np.asarray(mask.convert("L")) >= HALF).unsqueeze(0)


@dataclass(frozen=True)
class Kept:
    """What stays as it is, in latents [1, C, h, w]."""

    clean: Tensor
    noise: Tensor
    """The one that drawing began at."""
    mask: Tensor
    """[1, 1, h, w]: where latents are drawn anew."""

    def put_back(self, latents: Tensor, scheduler: Any, timestep: Tensor | None) -> Tensor:
        """Latents after a step, with what is kept at the scheduler's next time; None: there is none."""
        kept = self.clean if timestep is None else noised(scheduler, self.clean, self.noise, timestep)
        return latents.where(self.mask, kept)


class Start(NamedTuple):
    """Where drawing begins."""

    latents: Tensor
    """[1, C, h, w], fp32."""
    first: int = 0
    """Place in the scheduler's times."""
    kept: Kept | None = None
    seen: Tensor | None = None
    """What the model sees of the image, [1, C, h, w], where it was taught to edit."""


def begin(
    edit: Edit | None,
    request: Request,
    family: DiffusionFamily,
    scheduler: Any,
    generator: torch.Generator,
    device: torch.device,
) -> Start:
    """Begin at noise, or at an encoded image that is noised as far as its edit's strength says.

    The generator draws what it draws in diffusers' pipelines, in their order: of an edit the latents out of their
    distribution, the noise, and with a mask once more.
    """
    import torch

    def draw() -> Tensor:
        shape = (1, *family.latent_shape(request.height, request.width))
        return torch.randn(shape, generator=generator).to(device)

    sigma = getattr(scheduler, "init_noise_sigma", 1.0)
    if edit is None:
        return Start(draw() * sigma)
    assert edit.moments is not None
    if edit.shows is not None:  # the way up to the noise that draws it begins here, without any
        clean = family.sample_latents(edit.moments, torch.zeros_like(edit.moments["mean"]))
        return Start(clean, first_step(edit, request.steps, family.path))
    is_shown = edit.image_guidance is not None
    # The mean of the latents, not scaled: so models were trained that others published.
    seen = edit.moments["mean"] if is_shown else None
    if is_shown and edit.mask is None:
        return Start(draw() * sigma, seen=seen)
    clean, noise = family.sample_latents(edit.moments, draw()), draw()
    first = first_step(edit, request.steps, family.path) * getattr(scheduler, "order", 1)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    if edit.mask is None:
        return Start(noised(scheduler, clean, noise, scheduler.timesteps[first]), first)
    draw()  # they also encode the image without what is drawn anew
    # Every latent that holds something of what is marked: diffusers asks one pixel of each, and misses thin lines.
    mask = torch.nn.functional.adaptive_max_pool2d(repainted(edit.mask).float(), tuple(clean.shape[-2:]))
    kept = Kept(clean, noise, mask.bool().unsqueeze(0).to(device))
    if edit.strength == 1 or is_shown:
        return Start(noise * sigma, first, kept, seen)
    return Start(noised(scheduler, clean, noise, scheduler.timesteps[first]), first, kept)


def noised(scheduler: Any, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """Latents as far on the way to noise as the scheduler is at a time, a scalar."""
    times = timestep.view(1)
    if hasattr(scheduler, "scale_noise"):
        scaled: Tensor = scheduler.scale_noise(clean, times, noise)
        return scaled
    added: Tensor = scheduler.add_noise(clean, noise, times)
    return added
