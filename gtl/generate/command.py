"""What `gtl generate` does."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from gtl import __version__
from gtl.adapters.registry import Registry
from gtl.config.base import absolute_if_local
from gtl.config.names import parse_reference
from gtl.generate.prompts import Prompt, read_prompts
from gtl.generate.spread import Model, Order, Origin, Published, spread
from gtl.session import session
from gtl.types import DTYPES, GUIDANCE, STEPS, Progress, Sampler, UserError, sampler_of

if TYPE_CHECKING:
    from gtl.adapters.card import Base
    from gtl.families.base import Family
    from gtl.generate.cascade import Upscaler
    from gtl.generate.edit import Edit
    from gtl.generate.request import Request

GRID = 64
"""Pictures on the grid at most: the first ones."""


class Adapter(NamedTuple):
    """A published adapter that takes part."""

    name: str
    """NAME@VERSION."""
    folder: Path
    scale: float
    base: Base
    sampler: Sampler = "model"
    """That it was taught for."""
    edits: bool = False
    """Whether it was taught to edit an image that it is shown."""

    def __str__(self) -> str:
        return f"{self.name}:{self.scale:g}"


class Enlarged(NamedTuple):
    """By which model pictures are enlarged, and how."""

    model: str
    adapters: Sequence[str] = ()
    guidance: float = 4.0
    """The default of diffusers' pipeline: a picture that is there already leaves less to the prompt."""
    variant: str | None = None


class Opened(NamedTuple):
    """That, once it is found."""

    stage: Upscaler
    recipe: dict[str, Any]


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
    steps: int | None = None,
    guidance: float | None = None,
    width: int | None = None,
    height: int | None = None,
    count: int = 1,
    registry: str = "./registry",
    workers: int | str | None = None,
    upscaler: Enlarged | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Draw `count` pictures of every prompt into `out`; returns the files, the grid last.

    Picture i of a prompt has seed `seed` + i. Every PNG carries what it was made with. Of several pictures there is a
    grid too, one row a prompt. With `workers`, a number or "auto", they are drawn on a Ray cluster;
    see `spread`. Steps and guidance that are left out are what suits the adapters. With an `upscaler` width and height
    are those of the large picture.

    Raises:
        UserError: an argument, a file, an adapter or the model is wrong; an argument is named as an option.
    """
    if count < 1:
        raise UserError(f"--count: {count}: expected 1 or more")
    number = None if workers is None else read_workers(workers)
    out = Path(out)
    lines = None if prompt is prompts is None else read_prompts(prompt, None if prompts is None else Path(prompts))
    shelf = Registry(registry)
    chosen = find_adapters(shelf, adapters)
    if (editor := next((adapter for adapter in chosen if adapter.edits), None)) is not None:
        raise UserError(f"--adapter {editor.name}: was taught to edit images; give it one by gtl edit IMAGE")
    check_writable(out)
    origin = choose_base(model, chosen, revision, variant)
    family, fingerprint = open_model(origin, chosen)
    if lines is None:
        lines = read_prompts(None, None) if family.encoders else [Prompt(prompt="")]
    second = None if upscaler is None else open_upscaler(upscaler, shelf, steps)
    high, wide = (family if second is None else second.stage.family).default_size
    requests = make_requests(
        lines, count, seed, negative_prompt=negative_prompt, **sampling_of(chosen, steps, guidance),
        height=high if height is None else height, width=wide if width is None else width,
    )  # fmt: skip
    for request in requests:
        check_options(request, family, second=None if second is None else second.stage)
    recipe = recipe_of(origin, fingerprint, chosen)
    columns = count if len(lines) > 1 else None
    if second is not None:
        if number is not None:
            raise UserError(f"--workers: {workers}: a cascade is drawn here; leave it out")
        recipe |= {"upscaler": second.recipe}
        return draw_here(family, requests, chosen, out, recipe, columns, progress, second=second.stage)
    if number is None:
        return draw_here(family, requests, chosen, out, recipe, columns, progress)
    published = tuple(Published(shelf.store.root, adapter.name, adapter.scale, adapter.sampler) for adapter in chosen)
    return draw_on_cluster(Model(origin, fingerprint, published), requests, number, out, recipe, columns, progress)


def open_upscaler(asked: Enlarged, shelf: Registry, steps: int | None) -> Opened:
    """The stage that enlarges.

    Raises:
        UserError: the model or an adapter is wrong; `--upscaler` is named.
    """
    from gtl.generate.cascade import Upscaler

    try:
        chosen = find_adapters(shelf, asked.adapters)
        origin = Origin(absolute_if_local(asked.model), variant=asked.variant)
        family, fingerprint = open_model(origin, chosen)
        adapters = tuple((adapter.folder, adapter.scale) for adapter in chosen)
        stage = Upscaler(family, adapters, **sampling_of(chosen, steps, asked.guidance))
    except UserError as error:
        raise UserError(f"--upscaler {asked.model}: {error}") from None
    return Opened(stage, {**recipe_of(origin, fingerprint, chosen), "guidance": asked.guidance})


def recipe_of(origin: Origin, fingerprint: str, adapters: Sequence[Adapter]) -> dict[str, Any]:
    """What every file says beside its request."""
    return {
        "model": {**origin._asdict(), "fingerprint": fingerprint},
        "adapters": [str(adapter) for adapter in adapters],
        "gtl": __version__,
    }


def read_workers(asked: int | str) -> int | Literal["auto"]:
    """What `--workers` says.

    Raises:
        UserError: neither a number nor "auto".
    """
    if asked == "auto":
        return "auto"
    try:
        number = int(asked)
    except ValueError:
        number = 0
    if number < 1:
        raise UserError(f"--workers: {asked}: expected 1 or more, or auto")
    return number


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
        scale = parse_reference(reference).scale
        found.append(Adapter(name, registry.fetch(name), scale, card.base, card.sampler, card.edits))
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


def open_model(origin: Origin, adapters: Sequence[Adapter]) -> tuple[Family, str]:
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


def sampling_of(adapters: Sequence[Adapter], steps: int | None, guidance: float | None) -> dict[str, Any]:
    """How requests are sampled: by what the adapters were taught for, with its own numbers where none are given."""
    sampler = sampler_of(adapter.sampler for adapter in adapters)
    return {
        "sampler": sampler,
        "steps": STEPS[sampler] if steps is None else steps,
        "guidance": GUIDANCE[sampler] if guidance is None else guidance,
    }


def make_requests(lines: Sequence[Prompt], count: int, seed: int, **shared: Any) -> list[Request]:
    """`count` requests a prompt, prompt by prompt, with rising seeds; a line's own fields win."""
    from gtl.generate.request import Request

    requests = []
    for line in lines:
        own = {} if line.negative_prompt is None else {"negative_prompt": line.negative_prompt}
        first = seed if line.seed is None else line.seed
        requests += [Request(line.prompt, **{**shared, **own, "seed": first + i}) for i in range(count)]
    return requests


def check_options(
    request: Request, family: Family, edit: Edit | None = None, second: Upscaler | None = None
) -> None:  # fmt: skip
    """`drawing.check`, or `check_cascade`, with the field named as an option."""
    from gtl.generate.cascade import check_cascade
    from gtl.generate.drawing import check

    try:
        if second is None:
            check(request, family, edit)
        else:
            check_cascade(request, family, second)
    except UserError as error:
        name, colon, rest = str(error).partition(":")
        option = name.replace("_", "-") if name.isidentifier() else name
        raise UserError(f"--{option}{colon}{rest}") from None


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


def draw_here(
    family: Family, requests: Sequence[Request], adapters: Sequence[Adapter], out: Path,
    recipe: Mapping[str, Any], columns: int | None, progress: Progress | None, edit: Edit | None = None,
    second: Upscaler | None = None,
) -> list[Path]:  # fmt: skip
    """Draw in this process and save."""
    import torch

    from gtl.generate.images import generate
    from gtl.images import encode_png

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    recipe = {**recipe, "dtype": str(dtype).removeprefix("torch.")}
    folders = [(adapter.folder, adapter.scale) for adapter in adapters]
    drawn = generate(
        family, requests, folders, device=device, dtype=dtype, edit=edit, upscaler=second, progress=progress
    )
    files = ((index, encode_png(image, {**dataclasses.asdict(requests[index]), **recipe})) for index, image in drawn)
    return save(files, requests, out, recipe, columns)


def draw_on_cluster(
    model: Model, requests: Sequence[Request], workers: int | Literal["auto"], out: Path, recipe: Mapping[str, Any],
    columns: int | None, progress: Progress | None,
) -> list[Path]:  # fmt: skip
    """Draw with so many workers and save."""
    with session() as cluster:
        model = dataclasses.replace(model, dtype="bf16" if cluster.gpus else "fp32")
        recipe = {**recipe, "dtype": DTYPES[model.dtype]}
        orders = [Order(model, request, recipe) for request in requests]
        with closing(spread(orders, workers=None if workers == "auto" else workers, progress=progress)) as files:
            return save(files, requests, out, recipe, columns)


def save(
    files: Iterable[tuple[int, bytes]], requests: Sequence[Request], out: Path, recipe: Mapping[str, Any],
    columns: int | None,
) -> list[Path]:  # fmt: skip
    """Write PNG files as they come, then the grid; `columns` None: a square one."""
    from gtl.images import decode, grid, save_png, write_png

    paths = [out / f"{index:04d}.png" for index in range(len(requests))]
    for index, png in files:
        with writing(out):
            write_png(png, paths[index])
    shown = paths[:GRID]
    if len(shown) > 1:
        whole = grid([decode(path) for path in shown], columns or math.ceil(math.sqrt(len(shown))))
        pictures = [dataclasses.asdict(request) for request in requests[:GRID]]
        paths.append(out / "grid.png")
        with writing(out):
            save_png(whole, paths[-1], {**recipe, "pictures": pictures})
    return paths
