"""Requests and answers of the API: OpenAI's fields for images, and what image models take beside them."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, field_validator, model_validator

from gtl.config.base import Section
from gtl.config.names import Reference, parse_reference
from gtl.types import UserError
from serve.body import read_fields, read_json
from serve.errors import from_mistakes, invalid

MAX_SEED = 2**63 - 1
MAX_PROMPT = 32_000
"""Characters that OpenAI's API takes at most."""
MAX_STEPS = 1000

_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")


class Limits(Section):
    """The most that one request may ask for. What a model itself does not take is refused beside these."""

    max_pixels: Annotated[int, Field(ge=1)] | None = None
    """Of a picture that is drawn, of any base; left out: of each what its `max_picture_pixels` says."""
    max_steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] = 200
    """Of denoising, for one picture."""
    max_n: Annotated[int, Field(ge=1, le=10)] = 10
    """Pictures of one request."""
    max_prompt: Annotated[int, Field(ge=1, le=MAX_PROMPT)] = 4000
    """Characters of the prompt, of the negative prompt, and of what an edit inverts."""
    max_upload_bytes: Annotated[int, Field(ge=1)] = 20 * 2**20
    """Of an uploaded picture or mask, as a file."""
    max_upload_pixels: Annotated[int, Field(ge=1)] = 40_000_000
    """Of an uploaded picture or mask, decoded."""
    max_adapters: Annotated[int, Field(ge=0)] = 8
    """Adapters of one request, beside one that its model names."""


def _or_name(schema: dict[str, Any]) -> None:
    """What the adapter's schema says beside its own object: that its name alone is enough."""
    own = dict(schema)
    schema.clear()
    schema["anyOf"] = [own["properties"]["name"], own]


class Adapter(Section):
    """An adapter of the registry and how much of it; a text is NAME, NAME@VERSION or NAME@ALIAS, also with :SCALE."""

    model_config = ConfigDict(strict=True, json_schema_extra=_or_name)

    name: Annotated[str, Field(min_length=1, max_length=256)]
    """NAME, NAME@VERSION or NAME@ALIAS."""
    scale: Annotated[float, Field(ge=-10, le=10)] = 1.0
    """What its effect is multiplied with."""

    @model_validator(mode="before")
    @classmethod
    def _a_name_is_enough(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if not 1 <= len(value) <= 300:
            raise ValueError("should be a name of 1 to 300 characters")
        name, colon, _ = value.partition(":")
        return {"name": name, "scale": _reference(value).scale} if colon else {"name": name}

    @field_validator("name")
    @classmethod
    def _is_a_reference(cls, name: str) -> str:
        if ":" in name:
            raise ValueError("should be NAME, NAME@VERSION or NAME@ALIAS; the scale is a field of its own")
        _reference(name)
        return name

    @property
    def reference(self) -> Reference:
        """The adapter as the registry looks it up."""
        return parse_reference(self.name)._replace(scale=self.scale)


def _reference(text: str) -> Reference:
    try:
        return parse_reference(text)
    except UserError:
        raise ValueError("should be NAME, NAME@VERSION or NAME@ALIAS, of a-z, 0-9, '.', '_' and '-'") from None


class Drawing(Section):
    """What generations and edits have in common. A field that is null is as if it were left out."""

    prompt: Annotated[str, Field(min_length=1, max_length=MAX_PROMPT)]
    """What to draw."""
    model: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    """BASE, BASE:ADAPTER or BASE:ADAPTER@ALIAS, as GET /v1/models lists them; left out: the first base."""
    n: Annotated[int, Field(ge=1, le=10)] = 1
    """How many pictures; the one at place i has seed + i."""
    size: Annotated[str, Field(json_schema_extra={"pattern": f"^(auto|{_SIZE.pattern})$"})] = "auto"
    """WIDTHxHEIGHT in pixels, for example 512x768; auto is what the model was made for."""
    response_format: Literal["b64_json", "url"] = "b64_json"
    """url only where the server has a bucket for its pictures."""
    output_format: Literal["png", "webp", "jpeg"] = "png"
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    """Quality of webp and jpeg: 100, the default, is the best."""
    stream: bool = False
    """Send server-sent events, the picture last; only with n=1."""
    partial_images: Annotated[int, Field(ge=0, le=3)] = 0
    """Previews while it is drawn; only with stream."""

    negative_prompt: Annotated[str, Field(max_length=MAX_PROMPT)] | None = None
    """What guidance leads away from; only for models with classifier-free guidance."""
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    """Decides the picture together with the other fields; left out: drawn, and told in the answer."""
    num_inference_steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = None
    """Steps of denoising; left out: what suits the model."""
    guidance_scale: Annotated[float, Field(ge=0, le=100)] | None = None
    """Of classifier-free guidance, or what a distilled model reads; left out: what suits the model."""
    adapters: Annotated[tuple[Adapter, ...], Field(strict=False, max_length=100), FailFast()] = ()
    """Adapters that draw together, beside one that the model names."""

    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] = "auto"
    """Without effect, like those below: what OpenAI's clients send is accepted."""
    background: Literal["auto", "opaque"] = "auto"
    """Transparent is refused: these models draw no transparency."""
    user: Annotated[str, Field(max_length=512)] | None = None
    safety_identifier: Annotated[str, Field(max_length=512)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_left_out(cls, values: Any) -> Any:
        return {k: v for k, v in values.items() if v is not None} if isinstance(values, dict) else values

    @field_validator("size")
    @classmethod
    def _is_a_size(cls, size: str) -> str:
        if size != "auto" and not _SIZE.fullmatch(size):
            raise ValueError("should be auto or WIDTHxHEIGHT in pixels, for example 512x768")
        return size

    @model_validator(mode="after")
    def _fields_go_together(self) -> Drawing:
        if self.stream and self.n != 1:
            raise ValueError(f"stream: true: should be left out with n={self.n}; only one picture can be streamed")
        if self.partial_images and not self.stream:
            raise ValueError(f"partial_images: {self.partial_images}: should be 0 without stream=true")
        if self.stream and self.response_format == "url":
            raise ValueError("response_format: 'url': should be b64_json with stream=true")
        if self.output_format == "png" and self.output_compression not in (None, 100):
            raise ValueError(
                f"output_compression: {self.output_compression}: should be left out for png; it is for webp and jpeg"
            )
        if self.seed is not None and self.seed + self.n - 1 > MAX_SEED:
            raise ValueError(f"seed: {self.seed}: should leave room for n={self.n}: the last picture has seed + n - 1")
        return self

    @property
    def pixels(self) -> tuple[int, int] | None:
        """(width, height) that is asked for; None where the model decides."""
        found = _SIZE.fullmatch(self.size)
        return (int(found[1]), int(found[2])) if found else None

    @property
    def compression(self) -> int:
        """Quality of webp and jpeg, 0 to 100."""
        return 100 if self.output_compression is None else self.output_compression


class Generation(Drawing):
    """Body of POST /v1/images/generations."""

    model_config = ConfigDict(strict=True)

    style: Literal["vivid", "natural"] | None = None
    """Without effect."""
    moderation: Literal["auto", "low"] = "auto"
    """Without effect: what is refused is the server's to configure."""


class Edit(Drawing):
    """Form of POST /v1/images/edits, beside its files `image`, `mask`, and `colors_of`, a picture whose colours what is
    drawn gets."""

    strength: Annotated[float, Field(ge=0, le=1)] = 0.8
    """How far the picture may go from the one that was sent; 1 forgets it, but for what the mask keeps."""
    invert: str | None = None
    """What the picture that is sent shows: it is drawn from the noise that draws that, and keeps more of its structure
    than without. A low guidance_scale suits it, such as 3."""
    image_guidance_scale: Annotated[float, Field(ge=1, le=100)] | None = None
    """With an adapter that was taught to edit: how close to stay to the image that is sent, 1 is off; left out: 1.5.
    Such a one begins at noise, whatever the strength."""
    input_fidelity: Literal["low", "high"] | None = None
    """Without effect: `strength` says it."""

    @model_validator(mode="after")
    def _check_inversion(self) -> Edit:
        if self.invert is not None and self.n > 1:
            raise ValueError(f"n: {self.n}: should be 1 with invert, which draws no noise: all would be one picture")
        return self


Asked = TypeVar("Asked", bound=Drawing)


def parse_generation(body: bytes, limits: Limits, *, urls: bool) -> Generation:
    """Read the body of a request for pictures.

    Args:
        body: JSON.
        limits: What is allowed.
        urls: Whether there is a bucket that `response_format: url` can point into.

    Raises:
        ApiError: 400; names the field, its value and what is allowed.
    """
    return check(_validated(Generation, read_json(body), strict=None), limits, urls=urls)


def parse_edit(fields: Iterable[tuple[str, str]], limits: Limits, *, urls: bool) -> Edit:
    """Like `parse_generation`, for the text fields of a form; its files are for `serve.uploads`."""
    return check(_validated(Edit, read_fields(fields), strict=False), limits, urls=urls)


def _validated(model: type[Asked], values: Any, strict: bool | None) -> Asked:
    try:
        return model.model_validate(values, strict=strict)
    except ValidationError as error:
        raise from_mistakes(error.errors(include_url=False), model.model_fields) from None


def check(asked: Asked, limits: Limits, *, urls: bool) -> Asked:
    """Return the request.

    Raises:
        ApiError: 400; it is well-formed and asks for more than this server allows.
    """
    for field in ("prompt", "negative_prompt", "invert"):
        if (length := len(getattr(asked, field, None) or "")) > limits.max_prompt:
            raise invalid(field, f"{length} characters: should be at most {limits.max_prompt}", "invalid_value")
    if asked.pixels is not None:
        check_pixels(*asked.pixels, limits.max_pixels)
    for field, value, found, most in (
        ("n", asked.n, asked.n, limits.max_n),
        ("num_inference_steps", asked.num_inference_steps, asked.num_inference_steps or 0, limits.max_steps),
        ("adapters", f"{len(asked.adapters)} adapters", len(asked.adapters), limits.max_adapters),
    ):
        if found > most:
            raise invalid(field, f"{value}: should be at most {most}", "invalid_value")
    if asked.response_format == "url" and not urls:
        raise invalid("response_format", "'url': should be b64_json; this server keeps no pictures", "invalid_value")
    return asked


def check_pixels(width: int, height: int, most: int | None) -> None:
    """Let a size pass.

    Raises:
        ApiError: 400; it has more pixels than `most`.
    """
    if most is not None and width * height > most:
        size = f"'{width}x{height}' has {width * height} pixels"
        raise invalid("size", f"{size}: should be at most {most}", "invalid_value")


class Answer(BaseModel):
    """A part of an answer."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class TokenDetails(Answer):
    """Part of `Usage`."""

    image_tokens: int = 0
    text_tokens: int = 0


class Usage(Answer):
    """OpenAI's clients want it in a stream. Nothing is counted in tokens here, so all of it is 0."""

    input_tokens: int = 0
    input_tokens_details: TokenDetails = TokenDetails()
    output_tokens: int = 0
    total_tokens: int = 0


class Picture(Answer):
    """One picture of an answer."""

    b64_json: str | None = None
    """The encoded picture, in base64."""
    url: str | None = None
    seed: int | None = None
    """Its own: the answer's + its place."""
    flagged: Literal[True] | None = None
    """By the server's safety checker, and therefore blurred."""


class ImagesResponse(Answer):
    """Answer to POST /v1/images/generations and /v1/images/edits."""

    created: int = Field(default_factory=lambda: int(time.time()))
    """Unix time in seconds, as everywhere in the API."""
    data: tuple[Picture, ...]
    output_format: Literal["png", "webp", "jpeg"]
    size: str
    """WIDTHxHEIGHT."""
    seed: int
    """Of the first picture."""
    model: str
    """What drew it, with versions in place of aliases."""
    background: Literal["opaque"] = "opaque"


class Event(Answer):
    """What the events of a stream have in common."""

    b64_json: str
    size: str
    """WIDTHxHEIGHT."""
    flagged: Literal[True] | None = None
    """As of a `Picture`."""
    output_format: Literal["png", "webp", "jpeg"]
    created_at: int = Field(default_factory=lambda: int(time.time()))
    background: Literal["opaque"] = "opaque"
    quality: Literal["auto"] = "auto"


class PartialImage(Event):
    """A preview."""

    type: Literal["image_generation.partial_image", "image_edit.partial_image"]
    partial_image_index: int
    """From 0."""


class Completed(Event):
    """The picture; the last event of a stream."""

    type: Literal["image_generation.completed", "image_edit.completed"]
    seed: int
    model: str
    usage: Usage = Usage()


class Origin(Answer):
    """What gtl knows of a model beside what OpenAI's API says."""

    kind: Literal["base", "adapter"]
    base: str
    adapter: str | None = None
    version: str | None = None
    aliases: tuple[str, ...] = ()
    shares_batch: bool = True
    """Whether it draws in one batch with others; what can't waits for its turn."""
    default_size: str | None = None
    """WIDTHxHEIGHT that a base was made for, where its files are at hand."""
    max_pixels: int | None = None
    """Of a picture that a base may be asked for, width times height, where it is known before a generator is there."""
    family: str | None = None
    tuner: str | None = None
    """Kind of adapter, for example lora."""
    objective: str | None = None
    """What it learned by, for example denoise."""
    images: int | None = None
    """That it learned from."""
    steps: int | None = None
    """Of training."""


class Model(Answer):
    """One entry of GET /v1/models."""

    id: str
    """BASE, BASE:ADAPTER@VERSION or BASE:ADAPTER@ALIAS."""
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "gtl"
    gtl: Origin


class ModelList(Answer):
    """Answer to GET /v1/models."""

    object: Literal["list"] = "list"
    data: tuple[Model, ...]


def to_json(answer: Answer) -> bytes:
    """The bytes of an answer; what is None is left out."""
    return answer.model_dump_json(exclude_none=True).encode()


def sse(event: PartialImage | Completed) -> bytes:
    """A server-sent event."""
    return b"event: " + event.type.encode() + b"\ndata: " + to_json(event) + b"\n\n"
