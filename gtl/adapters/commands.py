"""What `gtl adapters` does: functions that return values; the command line prints them."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gtl.adapters.base import empty_parts, open_base
from gtl.adapters.card import Card, Lineage, base_of
from gtl.adapters.registry import Registry
from gtl.config.base import absolute_if_local
from gtl.config.load import read_sections
from gtl.config.names import check_name, new_version, parse_reference
from gtl.types import Progress, Sampler, UserError, quiet

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def list_adapters(registry: str) -> list[dict[str, Any]]:
    """One row a published version, sorted by name and version: name, version, aliases, kind, base, created.

    Of a version whose card is damaged that is said as its kind, with the reason as its base.
    """
    opened = Registry(registry)
    rows: list[dict[str, Any]] = []
    for name, version, aliases in opened.list():
        try:
            card = opened.show(f"{name}@{version}")
            kind, base, created = str(card.kind), card.base.source, card.created.isoformat(timespec="seconds")
        except UserError as error:
            kind, base, created = "damaged", str(error), ""
        rows.append({
            "name": name, "version": version, "aliases": list(aliases), "kind": kind, "base": base, "created": created,
        })  # fmt: skip
    return rows


def show_adapter(registry: str, reference: str) -> dict[str, Any]:
    """The card of a reference as plain values, with the aliases that point at it and its place.

    Raises:
        UserError: there is no such adapter.
    """
    opened = Registry(registry)
    card = opened.show(reference)
    aliases = [alias for alias, version in opened.aliases(card.name).items() if version == card.version]
    place = opened.store.url(f"{card.name}/{card.version}")
    return {**card.model_dump(mode="json", by_alias=True), "aliases": aliases, "url": place}


def promote_adapter(registry: str, reference: str, alias: str) -> str:
    """Point an alias at a version; returns NAME@VERSION. See `Registry.promote`."""
    return f"{parse_reference(reference).name}@{Registry(registry).promote(reference, alias)}"


def remove_adapter(registry: str, reference: str, force: bool = False) -> str:
    """Delete a version; returns NAME@VERSION. See `Registry.remove`."""
    return f"{parse_reference(reference).name}@{Registry(registry).remove(reference, force=force)}"


def import_adapter(
    registry: str, file: Path, model: str, name: str, revision: str | None = None, variant: str | None = None,
    sampler: Sampler = "model",
) -> Card:  # fmt: skip
    """Publish somebody's LoRA (diffusers, PEFT or kohya layout) for a model; returns its card.

    Raises:
        UserError: the name is malformed, the model cannot be opened, or the file does not fit it (see `import_lora`).
    """
    import torch

    from gtl.adapters.foreign import import_lora
    from gtl.adapters.formats import write_lora
    from gtl.families import open_family

    check_name(name, "adapter name")
    model = absolute_if_local(model)  # the card is read from other folders too
    family = open_family(model, revision=revision, variant=variant)
    with torch.device("meta"):
        parts = {part: family.build(part) for part in (family.main, *getattr(family, "encoders", ()))}
    weights = import_lora(file, parts)
    config = weights.config
    card = Card(
        name=name, version=new_version(name), base=base_of(family, model, revision), lineage=Lineage(file=file.name),
        sampler=sampler,
        tuner={"type": "lora", **{key: getattr(config, key) for key in ("rank", "alpha", "dora", "rslora")}},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        write_lora(weights.tensors, Path(folder), config=config)
        return Registry(registry).publish(name, card.version, Path(folder), card)


def fuse_adapters(
    registry: str, adapters: Sequence[str], name: str, method: str = "linear", *, rank: int | None = None,
    density: float | None = None, blocks: Sequence[str] = (), seed: int = 0, progress: Progress = quiet,
) -> Card:  # fmt: skip
    """Publish one adapter made of several, each NAME[@VERSION|@ALIAS][:WEIGHT]; returns its card. See `fuse`.

    Raises:
        UserError: a weight or a block cannot be read, or as for `fuse`.
    """
    from gtl.adapters.fuse import fuse

    opened = Registry(registry)
    chosen = [(str(each._replace(scale=1.0)), each.scale) for each in map(parse_reference, adapters)]
    fused = fuse(opened, chosen, method, name=name, rank=rank, density=density, blocks=read_blocks(blocks), seed=seed,
                 progress=progress)  # fmt: skip
    return opened.show(str(fused))


def read_blocks(texts: Sequence[str]) -> dict[str, list[float]]:
    """Factors of blocks, each text PREFIX=FACTOR[,FACTOR...] or a YAML file of PREFIX: FACTOR or a list of them.

    Raises:
        UserError: one cannot be read, or names a prefix again.
    """
    found: dict[str, list[float]] = {}
    for text in texts:
        prefix, equals, given = text.partition("=")
        values = {prefix: given.split(",")} if equals else read_sections(text, "blocks")
        for key, value in values.items():
            try:
                numbers = [float(each) for each in (value if isinstance(value, list) else [value])]
            except (TypeError, ValueError):
                numbers = []
            if not numbers or not all(map(math.isfinite, numbers)):
                raise UserError(
                    f"--blocks {text}: {key}: expected a number, or one for each adapter: unet.mid_block=0.5,1"
                )
            if str(key) in found:
                raise UserError(f"--blocks {text}: {key}: is given twice")
            found[str(key)] = numbers
    return found


def export_adapter(registry: str, reference: str, out: Path) -> str:
    """Copy a version's files, checked against its card, to a new folder; returns NAME@VERSION.

    Raises:
        UserError: there is no such adapter, a file is damaged, or the folder is not new.
    """
    check_new(out)
    opened = Registry(registry)
    card, version = opened.resolve(reference)
    folder = opened.fetch(f"{card.name}@{version}")
    try:
        shutil.copytree(folder, out, dirs_exist_ok=True)
    except shutil.Error as error:  # a list of (source, target, reason)
        raise UserError(f"--out {out}: cannot be written to: {error.args[0][0][2]}") from error
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written to: {error.strerror or error}") from error
    return f"{card.name}@{version}"


def export_pipeline(registry: str, reference: str, out: Path, dtype: str | None = None) -> str:
    """Write an adapter's base model with the adapter merged in, as a folder that diffusers loads; NAME@VERSION.

    A :SCALE of the reference counts. `dtype` (fp32, bf16 or fp16) is that of all parts; None keeps the stored ones.

    Raises:
        UserError: there is no such adapter, its base model is not there or is another, or the folder is not new.
    """
    import torch

    from gtl.adapters.apply import moved
    from gtl.adapters.merge import merge

    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype: {dtype!r}: expected one of {', '.join(DTYPES)}")
    check_new(out)
    opened = Registry(registry)
    card, version = opened.resolve(reference)
    folder, family = opened.fetch(f"{card.name}@{version}"), open_base(card)
    empty = empty_parts(family)
    changed = {name.partition(".")[0] for name in moved(empty, folder)}
    parts = {part: family.load(part, torch.float32) for part in empty if part in changed or dtype is not None}
    merge(parts, ((folder, parse_reference(reference).scale),))
    for name, part in parts.items():
        stored = next(family.weights(name))[1].dtype
        torch.nn.Module.to(part, getattr(torch, DTYPES[dtype]) if dtype else stored)
    family.export(parts, out)
    return f"{card.name}@{version}"


def check_new(out: Path) -> None:
    """Make a folder, which must not hold anything yet.

    Raises:
        UserError: it does, or it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise UserError(f"--out {out}: not empty; give a new folder")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written to: {error.strerror or error}") from error
