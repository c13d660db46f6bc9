"""What it takes to draw a picture with what a trial learned: floating-point operations, counted on shapes alone.

A count does not depend on what else the machine does, nor on which machine it is, so that two trials' compare. It is no
time: that of a small model is mostly launching, and memory's more than arithmetic's where batches are small.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gtl.adapters.apply import kind_of
from gtl.adapters.formats import A, layers_of
from gtl.adapters.sharing import fits
from gtl.adapters.slots import Slots, joint
from gtl.data.buckets import bucket_sizes
from gtl.families import denoising, open_family
from gtl.generate.request import Request, sampled_by
from gtl.train.flops import Counter
from gtl.train.footprint import embeddings, pretend
from gtl.types import Geometry

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gtl.config import Recipe
    from gtl.families.base import DiffusionFamily, Family


def inference_tflops(recipe: Recipe, adapter: Path | None = None) -> float:
    """10^12 operations of one picture, drawn as `evaluate` says; a multiply-add is two, see `gtl.train.flops`.

    Of every step the forward pass, twice under classifier-free guidance, which what was taught for few steps draws
    without; then the decoder. A low-rank adapter is computed beside the layers it is on, as an endpoint does that has
    many in a batch; what cannot be in a slot (DoRA, other weights) takes the place of the base's and adds nothing.
    Prompts are at their longest. Their encoding is not counted: that is done once for all pictures of a prompt.

    Args:
        recipe: Of the trial.
        adapter: Folder of what it published; None: the model alone.

    Raises:
        UserError: the model, or the adapter on it, is not what it has to be.
    """
    model = recipe.model
    family = open_family(model.source, model.family, model.revision, model.variant, weights=False)
    if family.draws == "at once":
        return _at_once(family) / 1e12
    return _denoised(recipe, denoising(family), adapter) / 1e12


def _at_once(family: Family) -> int:
    main, mode = family.load(family.main, torch.float32, "meta"), FakeTensorMode()
    pretend(main, mode)
    with mode, Counter() as counter, torch.no_grad():
        main(torch.zeros(1, family.noise_size))  # type: ignore[attr-defined]  # a NoiseFamily's
    return counter.total


def _denoised(recipe: Recipe, family: DiffusionFamily, adapter: Path | None) -> int:
    ((height, width),) = bucket_sizes(recipe.data.resolution, family.multiple, 1.0, family.max_size)
    asked = recipe.evaluate
    request = Request("", height, width, steps=asked.steps, guidance=asked.guidance)
    request = sampled_by(request, recipe.sampler, family)
    rows = 2 if family.classifier_free and request.guidance > 1 else 1
    passes = len(family.sampler(request.steps, height, width, request.sampler).timesteps)
    size = Geometry((height, width), (0, 0), (height, width))
    more = {**family.size_conditions(size), **family.guidance_conditions(request.guidance)}
    conditions = {**embeddings(family), **more}
    names = (family.main, *family.encoders, *([family.codec] if family.codec else []))
    parts = {name: family.load(name, torch.float32, "meta") for name in names}
    tensors = joint(parts, [(adapter, 1.0)]) if adapter is not None and in_slot(adapter) else {}
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # such as the prompt's conditions
    latents = torch.zeros(rows, *family.latent_shape(height, width))
    for name in (family.main, family.codec):
        if name is not None:
            pretend(parts[name], mode)
            seat(name, parts[name], tensors, mode)
    with mode, torch.no_grad():
        batch = family.collate([conditions] * rows)
        with Counter() as step:
            family.predict(parts[family.main], latents, torch.full((rows,), 1), batch)
        with Counter() as decoding:
            family.decode(parts[family.codec] if family.codec else None, latents[:1])
    return passes * step.total + decoding.total


def in_slot(adapter: Path) -> bool:
    """Whether an adapter is computed beside the base's layers; all others take the place of its weights, or of none."""
    return kind_of(adapter) == "lora" and fits(adapter) is None


def seat(part: str, module: nn.Module, tensors: Mapping[str, Tensor], mode: FakeTensorMode) -> None:
    """Give a pretended part's layers the updates that are theirs, for every row."""
    own = {key: tensor for key, tensor in tensors.items() if key.startswith(f"{part}.")}
    if not own:
        return
    layers = layers_of(own)
    with mode:
        targets = [name.removeprefix(f"{part}.") for name in layers]
        slots = Slots(part, module, targets, 2, max(len(group[A]) for group in layers.values()))
        slots.put(1, slots.stack(own))
        slots.assign_all(1)
