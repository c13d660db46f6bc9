"""The card of a published version: what was trained, from what, by what."""

from __future__ import annotations

import datetime
import json
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gtl import __version__
from gtl.types import Sampler, UserError

if TYPE_CHECKING:
    from gtl.families.base import Family

Kind = Literal["lora", "delta", "prompt", "pivotal"]
"""lora: low-rank updates, as PEFT and as diffusers read them. delta: new values of base weights. prompt: a word."""
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "deepspeed", "ray")


class Part(BaseModel):
    """A part of a card. A reader skips keys that a newer gtl added within the same schema."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True, use_attribute_docstrings=True)


class Base(Part):
    """The pretrained model under the adapter."""

    source: str
    """Hub id, folder or URL, as the recipe had it."""
    revision: str | None = None
    variant: str | None = None
    """Of its weight files that were read, for example fp16."""
    fingerprint: str
    """`Family.fingerprint()` of the whole model."""
    family: str


class DatasetInfo(Part):
    """The images it learned from."""

    fingerprint: str
    images: int
    """Neither class images nor those that were held out."""


class Fusion(Part):
    """What was fused, and how; see `gtl.adapters.fuse`."""

    method: str
    adapters: list[str]
    """NAME@VERSION of each."""
    weights: list[float]
    """One for each adapter."""
    blocks: dict[str, list[float]] = {}
    """Prefix of layers -> a factor for each adapter's weight in them."""
    rank: int | None = None
    """Of the layers, where one was asked for."""
    density: float | None = None
    seed: int | None = None
    """Of what DARE drops."""
    lost: float = 0.0
    """Of the fused update, as its norm's share: what its rank cannot hold."""


class Lineage(Part):
    """Where it came from: a run, a trial of a study, other adapters, or the file it was imported from."""

    run: str | None = None
    study: str | None = None
    trial: str | None = None
    file: str | None = None
    init: str | None = None
    """NAME@VERSION of the adapter that its training started from."""
    fusion: Fusion | None = None


class Training(Part):
    """What it took."""

    steps: int
    device: str = "cpu"
    """Kind of device, for example cpu or NVIDIA H100."""
    device_hours: float
    """Wall hours times devices."""
    final_loss: float | None = None
    """Of the last step."""
    val_loss: float | None = None
    """Of the published weights on held-out images."""
    scores: dict[str, float] = {}
    """Of the published weights: what they were chosen by, where that is measured of pictures."""
    best_step: int | None = None
    """After how many steps those weights were had, where the best ones are published."""


class File(Part):
    """One file of the version."""

    sha256: str
    bytes: int


class Card(Part):
    """`adapter.json`. Immutable once published; written last, so a version exists if and only if its card does."""

    schema_: Literal[1] = Field(default=1, alias="schema")
    name: str
    version: str
    kind: Kind = "lora"
    base: Base
    tuner: dict[str, Any]
    """The recipe's tuner section, resolved."""
    objective: dict[str, Any] = Field(default_factory=dict)
    """The recipe's objective section, resolved; empty for an imported adapter."""
    sampler: Sampler = "model"
    """That it was taught for; lcm draws in few steps."""
    dataset: DatasetInfo | None = None
    lineage: Lineage = Lineage()
    training: Training | None = None
    code: str = __version__
    """Version of gtl that made it."""
    libraries: dict[str, str] = Field(default_factory=lambda: library_versions())
    files: dict[str, File] = Field(default_factory=dict)
    """By path inside the version's folder; filled in by `Registry.publish`."""
    created: datetime.datetime = Field(default_factory=lambda: datetime.datetime.now(datetime.timezone.utc))

    @property
    def edits(self) -> bool:
        """Whether it was taught to edit an image that it is shown, and draws nothing without one."""
        return self.objective.get("type") == "instruct"

    def to_json(self) -> bytes:
        """The bytes of `adapter.json`."""
        return (json.dumps(self.model_dump(mode="json", by_alias=True), indent=2) + "\n").encode()


def parse_card(data: bytes, where: str) -> Card:
    """Read `adapter.json`.

    Raises:
        UserError: it is damaged, or of a schema that this gtl does not read; `where` is named.
    """
    try:
        return Card.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UserError(f"{where}: not a card that gtl {__version__} reads: {key}: {first['msg']}") from None


def base_of(family: Family, source: str, revision: str | None = None, fingerprint: str | None = None) -> Base:
    """The card's entry for an opened model; what publishes and what checks an adapter against a model both use it.

    A fingerprint that is known already is not computed again, which reads all of the model's files.
    """
    fingerprint = fingerprint or family.fingerprint()
    return Base(source=source, revision=revision, variant=family.variant, fingerprint=fingerprint, family=family.name)


def library_versions() -> dict[str, str]:
    """Installed versions of the libraries that shape a result; one that is not installed is left out."""
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found
