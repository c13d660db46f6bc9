"""What `gtl generate` does."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gtl import __version__
from gtl.adapters.registry import Registry
from gtl.config.base import absolute_if_local
from gtl.config.names import parse_reference
from gtl.generate.prompts import Prompt, read_prompts
from gtl.types import Progress, UserError

if TYPE_CHECKING:
    from PIL import Image

    from gtl.adapters.card import Base
    from gtl.families.base import DiffusionFamily
    from gtl.generate.engine import Request

GRID = 64
"""Pictures on the grid at most: the first ones."""


class Adapter(NamedTuple):
    """A published adapter that takes part."""

    name: str
    """NAME@VERSION."""
    folder: Path
    scale: float
    base: Base

    def __str__(self) -> str:
        return f"{self.name}:{self.scale:g}"


class Origin(NamedTuple):
    """Where a base model's files are found."""

    source: str
    revision: str | None
    variant: str | None


def run(
    *,
    out: str | Path,
    prompt: str | None = None,
    prompts: str | Path | None = None,
    model: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    adapters: Sequence[str] = (),
    negative_prompt: str = "",
    seed: int = 0,
    steps: int = 25,
    guidance: float = 7.5,
    width: int | None = None,
    height: int | None = None,
    count: int = 1,
    registry: str = "./registry",
    progress: Progress | None = None,
) -> list[Path]:
    """Draw `count` pictures of every prompt into `out`; returns the files, the grid last.

    Picture i of a prompt has seed `seed` + i. Every PNG carries what it was made with. Of several pictures there is a
    grid too, one row a prompt.

    Raises:
        UserError: an argument, a file, an adapter or the model is wrong; an argument is named as an option.
    """
    if count < 1:
        raise UserError(f"--count: {count}: expected 1 or more")
    out = Path(out)
    lines = read_prompts(prompt, None if prompts is None else Path(prompts))
    chosen = find_adapters(Registry(registry), adapters)
    check_writable(out)
    origin = choose_base(model, chosen, revision, variant)
    family, fingerprint = open_model(origin, chosen)
    high, wide = family.default_size
    requests = make_requests(
        lines, count, seed, negative_prompt=negative_prompt, steps=steps, guidance=guidance,
        height=high if height is None else height, width=wide if width is None else width,
    )  # fmt: skip
    for request in requests:
        check_options(request, family)
    recipe = {
        "model": {**origin._asdict(), "fingerprint": fingerprint},
        "adapters": [str(adapter) for adapter in chosen],
        "gtl": __version__,
    }
    return draw(family, requests, chosen, out, recipe, columns=count if len(lines) > 1 else None, progress=progress)


def find_adapters(registry: Registry, references: Sequence[str]) -> list[Adapter]:
    """Look the references up and check their files.

    Raises:
        UserError: there is no such adapter, its files are damaged, or one is given twice.
    """
    found: list[Adapter] = []
    for reference in references:
        card, version = registry.resolve(reference)
        name = f"{card.name}@{version}"
        if any(name == other.name for other in found):
            raise UserError(f"--adapter {reference}: {name} is given twice; give it once, with the scale you want")
        found.append(Adapter(name, registry.fetch(name), parse_reference(reference).scale, card.base))
    return found


def choose_base(
    model: str | None, adapters: Sequence[Adapter], revision: str | None = None, variant: str | None = None
) -> Origin:
    """Where the base model is: the one asked for, else the first adapter's; the same for its revision and variant.

    Raises:
        UserError: neither is given.
    """
    model = None if model is None else absolute_if_local(model)  # as cards have it
    bases = [adapter.base for adapter in adapters if model in (None, adapter.base.source)]
    if bases:
        return Origin(bases[0].source, revision or bases[0].revision, variant or bases[0].variant)
    if model is None:
        raise UserError("--model: missing; give a model, or an --adapter whose card names its base")
    return Origin(model, revision, variant)


def open_model(origin: Origin, adapters: Sequence[Adapter]) -> tuple[DiffusionFamily, str]:
    """The family and the model's fingerprint.

    Raises:
        UserError: the model cannot be opened, or an adapter was made for another one.
    """
    from gtl.families import open_family

    family = open_family(origin.source, revision=origin.revision, variant=origin.variant)
    fingerprint = family.fingerprint()
    for adapter in adapters:
        if adapter.base.fingerprint != fingerprint:
            raise UserError(
                f"--adapter {adapter.name}: was made for {adapter.base.source} ({adapter.base.fingerprint[:12]}); "
                f"the model is {origin.source} ({fingerprint[:12]})"
            )
    return family, fingerprint


def make_requests(lines: Sequence[Prompt], count: int, seed: int, **shared: Any) -> list[Request]:
    """`count` requests a prompt, prompt by prompt, with rising seeds; a line's own fields win."""
    from gtl.generate.engine import Request

    requests = []
    for line in lines:
        own = {} if line.negative_prompt is None else {"negative_prompt": line.negative_prompt}
        first = seed if line.seed is None else line.seed
        requests += [Request(line.prompt, **{**shared, **own, "seed": first + i}) for i in range(count)]
    return requests


def check_options(request: Request, family: DiffusionFamily) -> None:
    """`engine.check`, with the field named as an option."""
    from gtl.generate.engine import check

    try:
        check(request, family)
    except UserError as error:
        raise UserError(f"--{error}") from None


def check_writable(out: Path) -> None:
    """Make the folder and try it, before minutes are spent on pictures for it.

    Raises:
        UserError: it cannot be made or written to.
    """
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turn a failure to write into one line that names the folder."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written to: {error.strerror or error}") from error


def draw(
    family: DiffusionFamily,
    requests: Sequence[Request],
    adapters: Sequence[Adapter],
    out: Path,
    recipe: Mapping[str, Any],
    *,
    columns: int | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Draw and save; pictures are on disk as soon as they are done. `columns` None: a square grid."""
    import torch

    from gtl.generate.images import generate
    from gtl.images import grid, save_png

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    recipe = {**recipe, "dtype": str(dtype).removeprefix("torch.")}
    paths = [out / f"{index:04d}.png" for index in range(len(requests))]
    shown: dict[int, Image.Image] = {}
    folders = [(adapter.folder, adapter.scale) for adapter in adapters]
    for index, image in generate(family, requests, folders, device=device, dtype=dtype, progress=progress):
        with writing(out):
            save_png(image, paths[index], {**dataclasses.asdict(requests[index]), **recipe})
        if index < GRID:
            shown[index] = image
    if len(shown) > 1:
        paths.append(out / "grid.png")
        columns = columns or math.ceil(math.sqrt(len(shown)))
        whole = grid([shown[index] for index in sorted(shown)], columns)
        pictures = [dataclasses.asdict(requests[index]) for index in sorted(shown)]
        with writing(out):
            save_png(whole, paths[-1], {**recipe, "pictures": pictures})
    return paths
