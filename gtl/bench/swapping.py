"""Plain diffusers with one adapter at a time, as most servers draw: what `gtl bench serve` compares with."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gtl.adapters.formats import DIFFUSERS_WEIGHTS
from gtl.bench.models import CAPTION
from gtl.bench.train import synchronize
from gtl.families.files import INDEX, read_json
from gtl.imports import light, quieted

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gtl.families.base import Conditions, DiffusionFamily
    from gtl.generate.request import Request

ARGUMENTS = {
    "encoder_hidden_states": "prompt_embeds", "text_embeds": "pooled_prompt_embeds",
    "pooled_projections": "pooled_prompt_embeds",
}  # fmt: skip
"""Names of conditions in the models -> in the pipelines."""


class Swapping:
    """A family's own pipeline in diffusers, without the encoders: prompts come encoded, as they do to the engine."""

    def __init__(
        self, family: DiffusionFamily, parts: Mapping[str, nn.Module], prompts: Mapping[str, Conditions]
    ) -> None:
        """`parts` are the main part, without slots, and the codec; `prompts` the caption's conditions and ""'s."""
        with light(), quieted():
            import diffusers

            kind: Any = getattr(diffusers, read_json(family.folder / INDEX)["_class_name"])
        wanted = inspect.signature(kind.__init__).parameters
        height, width = family.default_size
        parameters = [one for name, one in wanted.items() if name != "self" and one.default is inspect.Parameter.empty]
        components: dict[str, Any] = {one.name: None for one in parameters}
        components |= {**parts, "scheduler": family.sampler(1, height, width)}
        if "requires_safety_checker" in wanted:
            components["requires_safety_checker"] = False
        self._pipe = kind(**components)
        self._pipe.set_progress_bar_config(disable=True)
        # It warns of every adapter that it has nothing for encoders, which are not here.
        logging.getLogger("diffusers.loaders").setLevel(logging.ERROR)
        main = parts[family.main]
        self._device = next(main.parameters()).device
        given = {ARGUMENTS[name]: value for name, value in prompts[CAPTION].items()}
        if family.classifier_free:
            negative = family.unconditional(prompts[""])
            given |= {f"negative_{ARGUMENTS[name]}": value for name, value in negative.items()}
        self._prompts = {name: value[None].to(self._device) for name, value in given.items()}
        self.loading = 0.0
        """Seconds of putting adapters on and off, so far."""

    def draw(self, work: Sequence[tuple[Request, Path]]) -> list[Tensor]:
        """Latents of every request, one after the other, each with the adapter in its folder."""
        return [self._one(request, folder) for request, folder in work]

    def _one(self, request: Request, folder: Path) -> Tensor:
        with self._changing():
            self._pipe.load_lora_weights(folder, weight_name=DIFFUSERS_WEIGHTS, adapter_name="one")
        latents: Tensor = self._pipe(
            **self._prompts, height=request.height, width=request.width, num_inference_steps=request.steps,
            guidance_scale=request.guidance, generator=torch.Generator().manual_seed(request.seed),
            output_type="latent", return_dict=False,
        )[0]  # fmt: skip
        with self._changing():
            self._pipe.unload_lora_weights()
        return latents

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Adapters are put on or off within it."""
        synchronize(self._device)
        begun = time.perf_counter()
        yield
        synchronize(self._device)
        self.loading += time.perf_counter() - begun
