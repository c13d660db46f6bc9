"""What is served under which name: bases, and the registry's versions and aliases as they stand now."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from gtl.adapters import Card, Registry
from gtl.adapters.sharing import fits
from gtl.config.base import is_url
from gtl.config.names import NAME, parse_reference
from gtl.families import FAMILIES, denoising, family_class, open_family
from gtl.types import Sampler, UserError, sampler_of
from serve.errors import invalid, model_not_found
from serve.schema import Adapter, Drawing, Edit, Model, Origin, check_pixels
from serve.settings import Base, Settings, most_pixels

if TYPE_CHECKING:
    from gtl.families.base import DiffusionFamily

log = logging.getLogger(__name__)

BUILT_IN = "builtin:tiny"
"""Served where there is nothing else."""


@dataclass(frozen=True)
class Entry:
    """A published version for a base that is served."""

    base: Base
    card: Card
    aliases: tuple[str, ...]

    @property
    def name(self) -> str:
        """NAME@VERSION."""
        return f"{self.card.name}@{self.card.version}"


class Chosen(NamedTuple):
    """What a request asks for, with versions in place of aliases."""

    base: Base
    adapters: tuple[tuple[str, float], ...]
    """NAME@VERSION and scale."""
    merged: bool = False
    """Whether they have to be merged into the weights."""
    sampler: Sampler = "model"
    """That they were taught for."""
    edits: bool = False
    """Whether one was taught to edit an image that it is shown."""

    @property
    def title(self) -> str:
        """As it is told: what a client would name as its `model`, but for more adapters or other scales than 1."""
        return ":".join([self.base.name, "+".join(self.names)]) if self.adapters else self.base.name

    @property
    def names(self) -> list[str]:
        """Of the adapters, NAME@VERSION[:SCALE]."""
        return [str(parse_reference(name)._replace(scale=scale)) for name, scale in self.adapters]


class Catalog:
    """The registry as it was read last. Cards never change, so each is read once."""

    def __init__(self, settings: Settings) -> None:
        """Read it.

        Raises:
            UserError: the registry cannot be read, or a base is none.
        """
        self.registry = Registry(settings.registry)
        self._cards: dict[tuple[str, str], Card] = {}
        self._lock = threading.Lock()
        found = self._read()
        self.bases = tuple(bases_of(self._cards.values()) if settings.bases == "auto" else settings.bases)
        here = {base.name: find_here(base) for base in self.bases}
        self._prints = {name: None if family is None else family.fingerprint() for name, family in here.items()}
        self._families = {base.name: here[base.name] or find_configs(base) for base in self.bases}
        self._sizes = {name: size_of(family) for name, family in self._families.items()}
        self._most = {base.name: most_pixels(base, settings.limits, self._sizes[base.name]) for base in self.bases}
        self._entries = self._match(found)

    def refresh(self) -> None:
        """Read the registry again.

        Raises:
            UserError: it cannot be read; what was read before stands.
        """
        with self._lock:
            self._entries = self._match(self._read())

    def _read(self) -> list[tuple[Card, tuple[str, ...]]]:
        """Cards with their aliases; those that were read before are not read again."""
        found, cards = [], {}
        for name, version, aliases in self.registry.list():
            try:
                card = self._cards.get((name, version)) or self.registry.show(f"{name}@{version}")
            except UserError as error:  # one that is damaged, or was removed just now, keeps no other from being served
                log.warning("not served: %s", error)
                continue
            cards[name, version] = card
            found.append((card, aliases))
        self._cards = cards
        return found

    def _match(self, found: Iterable[tuple[Card, tuple[str, ...]]]) -> tuple[Entry, ...]:
        """What of the registry is for a base that is served."""
        entries = []
        for card, aliases in found:
            base = next((base for base in self.bases if self._is_for(card, base)), None)
            if base is not None:
                entries.append(Entry(base, card, aliases))
        return tuple(entries)

    def _is_for(self, card: Card, base: Base) -> bool:
        known = self._prints[base.name]
        if known is not None:
            return card.base.fingerprint == known
        return (card.base.source, card.base.revision) == (base.source, base.revision)

    def settle(self, asked: Drawing) -> Chosen:
        """What a request means, its size being one that its base may be asked for.

        Raises:
            ApiError: 404, there is none such; 400, an adapter is given twice or has nothing to edit, or there are too
                many pixels.
        """
        chosen = self.choose(asked.model, asked.adapters)
        check_way(asked, chosen)
        if asked.pixels is not None:
            check_pixels(*asked.pixels, self._most[chosen.base.name])
        return chosen

    def bounds(self, base: Base) -> tuple[DiffusionFamily | None, int | None]:
        """A base's family, for its configs, and the most pixels of its pictures; None: it is not known here."""
        return self._families[base.name], self._most[base.name]

    def check_merged(self, base: Base) -> None:
        """See that what a base is to have merged into its weights is served.

        Raises:
            UserError: one is not.
        """
        if unknown := next((name for name in base.merged if self._find(base, name) is None), None):
            raise UserError(f"bases: {base.name}: merged: {unknown!r}: no adapter of it in {self.registry.store.root}")

    def choose(self, model: str | None, adapters: Iterable[Adapter]) -> Chosen:
        """The base and the versions that a request means.

        Args:
            model: BASE, BASE:ADAPTER[@VERSION|@ALIAS] or the adapter alone; None: the first base.
            adapters: That draw beside one that the model names.

        Raises:
            ApiError: 404, there is none such; 400, an adapter is given twice.
        """
        name, _, rest = (model or self.bases[0].name).partition(":")
        base = next((base for base in self.bases if base.name == name), None)
        wanted = [(rest, 1.0, "model")] if rest else []
        if base is None and not rest:
            found = self._find(None, name)
            base, wanted = (None, []) if found is None else (found.base, [(name, 1.0, "model")])
        if base is None:
            raise model_not_found(model or "", [one.id for one in self.models()])
        wanted += [(one.name, one.scale, "adapters") for one in adapters]
        chosen: dict[str, float] = {}
        samplers: list[Sampler] = []
        edits = False
        for reference, scale, field in wanted:
            entry = self._find(base, reference)
            if entry is None:
                names = [one.card.name for one in self._entries if one.base == base]
                known = [f"{base.name}:{name}" for name in names] if field == "model" else names
                raise model_not_found(model or "" if field == "model" else reference, dict.fromkeys(known), field)
            if entry.name in chosen:
                raise invalid(field, f"{entry.name} is given twice; give it once, with the scale you want")
            chosen[entry.name] = scale
            samplers.append(entry.card.sampler)
            edits |= entry.card.edits
        hot = {entry.name for entry in (self._find(base, name) for name in base.merged) if entry is not None}
        merged = len(chosen) == 1 and hot >= chosen.keys() and set(chosen.values()) == {1.0}
        return Chosen(base, tuple(chosen.items()), merged, sampler_of(samplers), edits)

    def _find(self, base: Base | None, reference: str) -> Entry | None:
        """The version that NAME, NAME@VERSION or NAME@ALIAS means; of a name alone the newest."""
        name, at, wanted = reference.partition("@")
        mine = [one for one in self._entries if one.card.name == name and base in (None, one.base)]
        if not at:
            return mine[-1] if mine else None
        exact = [one for one in mine if one.card.version == wanted]
        return next(iter(exact or [one for one in mine if wanted in one.aliases]), None)

    def card(self, reference: str) -> Card:
        """Of an adapter that is served.

        Raises:
            ApiError: 404.
        """
        if (entry := self._find(None, reference)) is None:
            raise model_not_found(reference, {one.card.name for one in self._entries}, "name")
        return entry.card

    def models(self) -> list[Model]:
        """Bases, and every version and alias."""
        found = [
            Model(id=name, created=0, gtl=Origin(
                kind="base", base=name, default_size=size and f"{size[1]}x{size[0]}", max_pixels=self._most[name],
            ))
            for name, size in self._sizes.items()
        ]  # fmt: skip
        for entry in self._entries:
            for suffix in (entry.card.version, *entry.aliases):
                found.append(model_of(entry, f"{entry.base.name}:{entry.card.name}@{suffix}"))
        return found

    def model(self, identity: str) -> Model:
        """One of `models`, or the newest version of BASE:ADAPTER.

        Raises:
            ApiError: 404.
        """
        known = self.models()
        if found := next((one for one in known if one.id == identity), None):
            return found
        chosen = self.choose(identity, ())
        if not chosen.adapters:  # nothing, or a base and a colon: what a request may say, and no name of a model
            raise model_not_found(identity, [one.id for one in known])
        entry = self._find(chosen.base, chosen.adapters[0][0])
        assert entry is not None
        return model_of(entry, identity)


def check_way(asked: Drawing, chosen: Chosen) -> None:
    """Let what was taught to edit have a picture to edit, and nothing else the scale of guidance by one.

    Raises:
        ApiError: 400.
    """
    if chosen.edits and not isinstance(asked, Edit):
        names = ", ".join(chosen.names)
        raise invalid("model", f"{names}: was taught to edit pictures: send one to /v1/images/edits")
    scale = asked.image_guidance_scale if isinstance(asked, Edit) else None
    if scale is not None and not chosen.edits:
        raise invalid("image_guidance_scale", f"{scale:g}: no adapter here was taught to edit; leave it out")


def model_of(entry: Entry, identity: str) -> Model:
    """What is told of an adapter."""
    card = entry.card
    origin = Origin(
        kind="adapter", base=entry.base.name, adapter=card.name, version=card.version, aliases=entry.aliases,
        shares_batch=fits(card) is None, family=card.base.family, tuner=card.tuner.get("type"),
        objective=card.objective.get("type"), images=card.dataset.images if card.dataset else None,
        steps=card.training.steps if card.training else None,
    )  # fmt: skip
    return Model(id=identity, created=int(card.created.timestamp()), gtl=origin)


def can_be_served(family: str) -> bool:
    """Whether its models draw step by step, and by themselves."""
    kind = family_class(family)
    return kind.draws == "by denoising" and bool(kind.draws_alone)


def bases_of(cards: Iterable[Card]) -> tuple[Base, ...]:
    """What adapters were made for.

    Raises:
        UserError: two bases would have one name.
    """
    found: dict[str, Base] = {}
    for origin in (card.base for card in cards):
        if origin.family in FAMILIES and not can_be_served(origin.family):
            continue
        base = Base(name=name_of(origin.source), source=origin.source, revision=origin.revision, variant=origin.variant)
        if found.setdefault(base.name, base) != base:
            raise UserError(
                f"bases: auto: {origin.source} and {found[base.name].source} would both be {base.name!r}; name them"
            )
    return tuple(found.values()) or (Base(name=name_of(BUILT_IN), source=BUILT_IN),)


def name_of(source: str) -> str:
    """What a model is called by: the last part of where it is."""
    last = source.rstrip("/").replace(":", "/").rpartition("/")[2].lower()
    name = "".join(letter if NAME.fullmatch(f"a{letter}") else "-" for letter in last).lstrip("._-")
    return name or "base"


def find_here(base: Base) -> DiffusionFamily | None:
    """A model whose files are here; None for one that is elsewhere and need not be fetched to be listed.

    Raises:
        UserError: there is no model.
    """
    is_here = base.source.startswith("builtin:") or (not is_url(base.source) and os.path.isdir(base.source))
    if not is_here:
        return None
    family = denoising(open_family(base.source, revision=base.revision, variant=base.variant))
    if not family.draws_alone:
        raise UserError(f"bases: {base.name}: {base.source}: a model of family {family.name} only enlarges pictures")
    return family


def find_configs(base: Base) -> DiffusionFamily | None:
    """A model of which no weight is here; None where its configs cannot be had: generators say what is wrong."""
    try:
        return denoising(open_family(base.source, revision=base.revision, variant=base.variant, weights=False))
    except UserError as error:
        log.warning("%s: its size is not known here: %s", base.name, error)
        return None


def size_of(family: DiffusionFamily | None) -> tuple[int, int] | None:
    """(height, width) that a model was made for, if it is known."""
    return None if family is None else family.default_size
