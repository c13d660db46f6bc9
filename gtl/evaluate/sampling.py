"""Which pictures a model is judged by: the same prompts, seeds and sampler for every one that is compared."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gtl.config.evaluate import Evaluate
from gtl.config.metrics import of_pictures
from gtl.config.templates import PLAIN
from gtl.data.reference import Reference
from gtl.evaluate.result import Sampling
from gtl.types import UserError

if TYPE_CHECKING:
    from gtl.families.base import Family
    from gtl.generate.request import Request
    from gtl.types import Sampler


def plan(asked: Evaluate, images: Reference, dtype: str, template: str = PLAIN) -> Sampling:
    """The prompts and how they are drawn.

    Raises:
        UserError: they are to be the images' captions, and no image has one.
    """
    prompts = list(images.captions) if asked.prompts == "auto" else list(asked.prompts)
    if not of_pictures(asked.metrics):
        prompts = []
    elif not prompts:
        raise UserError("evaluate.prompts: auto: no image has a caption; give prompts")
    height, width = images.size
    return Sampling(
        prompts=prompts[: asked.samples], negative_prompt=asked.negative_prompt, seed=asked.seed, steps=asked.steps,
        guidance=asked.guidance, height=height, width=width, dtype=dtype, template=template,
    )  # fmt: skip


def requests(how: Sampling, number: int, family: Family, sampler: Sampler) -> list[Request]:
    """Of so many samples, in their order, for a model that was taught for a sampler."""
    from gtl.generate.request import Request, sampled_by

    asked = (
        Request(
            how.template.replace(PLAIN, prompt), how.height, how.width, negative_prompt=how.negative_prompt,
            seed=how.seed + i, steps=how.steps, guidance=how.guidance,
        )
        for i, prompt in enumerate(how.prompts_of(number))
    )  # fmt: skip
    return [sampled_by(request, sampler, family) for request in asked]
