"""What an endpoint is made of: the `args` of the application in a Ray Serve config, typed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from gtl.config.base import ModelSource, Place, Section
from gtl.config.names import NAME
from gtl.types import GUIDANCE, STEPS, Sampler
from serve.schema import Limits

TIMES = 4
"""The pixels of the size that a model was made for are the most that is drawn where no config says: twice each side."""


class Replicas(Section):
    """Generators of one base model, each a process with the model in it."""

    min: Annotated[int, Field(ge=0)] = 1
    """0: none while nobody asks; the first request then waits until the model is loaded."""
    max: Annotated[int, Field(ge=1)] = 1
    target_s: Annotated[float, Field(gt=0)] = 10.0
    """What a new request may have to wait for, on average, before another generator is started."""
    down_after_s: Annotated[float, Field(ge=0)] = 60.0
    """Until one that is not needed any more ends; it finishes what it draws."""
    to_zero_after_s: Annotated[float, Field(ge=0)] = 600.0
    """Until the last one ends too, where min is 0."""
    cpus: Annotated[float, Field(ge=0)] = 1
    """Of each."""
    gpus: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    """Of each; auto: 1 where the cluster has any."""

    @model_validator(mode="after")
    def _at_least_min(self) -> Replicas:
        if self.max < self.min:
            raise ValueError(f"max: {self.max}: should be at least min, {self.min}")
        return self


class Base(Section):
    """A base model that is served, with every adapter of the registry that was made for it."""

    name: Annotated[str, Field(pattern=f"^{NAME.pattern}$", max_length=128)]
    """What clients call it: `model: NAME` or `model: NAME:ADAPTER`."""
    source: ModelSource
    """A hub id, a local folder in diffusers layout, a bucket URL of one, or builtin:tiny."""
    revision: str | None = None
    variant: str | None = None
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU."""
    slots: Annotated[int, Field(ge=1)] = 16
    """Adapters that are on the device at once, ready to share a batch."""
    max_rank: Annotated[int, Field(ge=1)] = 64
    """Of an adapter in a slot; one of a higher rank draws in batches of its own."""
    targets: Literal["attention", "all-linear", "all-linear+conv"] = "all-linear+conv"
    """Layers that have slots; an adapter for others draws in batches of its own. The fewer, the less memory."""
    max_batch: Annotated[int, Field(ge=1)] = 8
    """Pictures of one step at most."""
    max_pixels: Annotated[int, Field(ge=1)] | None = None
    """Of a step's pictures together; left out: of `max_batch` pictures of the size that the model was made for."""
    max_picture_pixels: Annotated[int, Field(ge=1)] | None = None
    """Of a picture that a request may ask for; left out: `limits.max_pixels`, and without that four times those of
    the size that the model was made for."""
    merged: list[str] = []
    """Adapters (NAME, NAME@VERSION or NAME@ALIAS) that are merged into the weights when they draw alone, at scale 1: a
    little faster for one that nearly all ask for, and in batches of its own."""
    compile: bool = False
    """Compile the model: slow at the first picture of each size and batch, faster afterwards. For GPUs."""
    host_gib: Annotated[float, Field(gt=0)] = 4.0
    """Memory for adapters that are not in a slot just now."""
    steps: Annotated[int, Field(ge=1)] = 25
    """Where neither a request nor an adapter for few steps says."""
    guidance: Annotated[float, Field(ge=0)] = 7.5
    """Where neither a request nor an adapter for few steps says."""
    replicas: Replicas = Replicas()

    def sampling(self, sampler: Sampler) -> tuple[int, float]:
        """Steps and guidance where a request does not say."""
        return (self.steps, self.guidance) if sampler == "model" else (STEPS[sampler], GUIDANCE[sampler])


class Safety(Section):
    """What looks at every picture and preview before it leaves."""

    checker: ModelSource
    """Stable Diffusion's safety checker: a folder or hub id of a pipeline that has it, or of itself."""
    action: Literal["refuse", "blur"] = "refuse"
    """Of a picture that is flagged. A preview that is flagged is left out, or blurred too."""
    threshold: Annotated[float, Field(ge=-2, le=2)] = 0.0
    """How far beyond the checker's own limits is too far; below 0 it flags more."""


class Settings(Section):
    """`args` of the application."""

    registry: Place = "./registry"
    """Folder or bucket URL of the adapters."""
    bases: Literal["auto"] | Annotated[list[Base], Field(min_length=1)] = "auto"
    """auto: those that the registry's adapters were made for; builtin:tiny if it has none."""
    limits: Limits = Limits()
    keys: Place | None = None
    """File of API keys, hashed; left out: anybody may ask, which is for loopback only."""
    requests_per_minute: Annotated[float, Field(gt=0)] | None = None
    """Of a key; left out: any number. Each ingress lets pass an equal share, which is all that a client gets whose
    requests come to one of them alone."""
    ingresses: Annotated[int, Field(ge=1)] = 1
    """Processes that answer HTTP; `max_running` and `max_waiting` are of each."""
    max_running: Annotated[int, Field(ge=1)] = 32
    """Pictures that an ingress has in work at once; the rest wait, fairly between keys."""
    max_waiting: Annotated[int, Field(ge=0)] = 64
    """Pictures that wait in an ingress at most; further ones are refused with 429."""
    timeout_s: Annotated[float, Field(gt=0)] = 300.0
    """Until a request is given up."""
    disk_gib: Annotated[float, Field(gt=0)] = 50.0
    """What each machine keeps on its disk of adapters that come from a bucket; beyond it the longest unused go."""
    refresh_s: Annotated[float, Field(gt=0)] = 10.0
    """How often the registry is read again: new versions, and aliases that moved."""
    output: Place | None = None
    """Folder or bucket URL for pictures of `response_format: url`."""
    link_s: Annotated[int, Field(ge=1, le=604_800)] = 3600
    """How long a link to a picture on S3 may be followed by whoever has it; elsewhere the answer has its place."""
    safety: Safety | None = None
    """Left out: nothing looks at pictures."""
    keep_prompt: bool = True
    """Write the prompt into the pictures' metadata, with the rest of what drew them."""

    @model_validator(mode="after")
    def _names_differ(self) -> Settings:
        names = [] if self.bases == "auto" else [base.name for base in self.bases]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"bases: {name!r}: should be the name of one base, and is of {names.count(name)}")
        return self


def most_pixels(base: Base, limits: Limits, made_for: tuple[int, int] | None) -> int | None:
    """Of a picture that a request may ask a base for.

    Args:
        base: What its own config says.
        limits: What holds for all bases; the smaller of the two counts.
        made_for: Size of the model; None: not known here.

    Returns:
        None where only the generator knows, which has the model.
    """
    told = [most for most in (base.max_picture_pixels, limits.max_pixels) if most is not None]
    if told:
        return min(told)
    return None if made_for is None else TIMES * made_for[0] * made_for[1]


def resolved(values: dict[str, Any]) -> Settings:
    """Settings from what stands in a config.

    Raises:
        UserError: a key or value is wrong.
    """
    from gtl.config.explain import parse

    return parse(Settings, values)
