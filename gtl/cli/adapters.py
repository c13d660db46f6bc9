"""`gtl adapters`: the registry of adapters."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from gtl.cli.bar import Bar
from gtl.cli.options import AdapterName, AsJson, RegistryUrl, Revision, Variant
from gtl.types import Sampler, UserError

app = typer.Typer(
    no_args_is_help=True, help="The registry of adapters: list, show, promote, import, fuse, export, remove."
)


def tell(text: str, values: dict[str, str], as_json: bool) -> None:
    """What was done, for people or for scripts."""
    print(json.dumps(values) if as_json else text)


@app.command("list")
def list_(registry: RegistryUrl = "./registry", json_: AsJson = False) -> None:
    """Every published version with its aliases."""
    from gtl.adapters.commands import list_adapters

    rows = list_adapters(registry)
    if json_:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        aliases = "".join(f" @{alias}" for alias in row["aliases"])
        print(f"{row['name']}@{row['version']}  {row['kind']}  {row['base']}{aliases}")


@app.command("show")
def show(adapter: AdapterName, registry: RegistryUrl = "./registry", json_: AsJson = False) -> None:
    """An adapter's card: base, tuner, data, lineage, files."""
    import yaml

    from gtl.adapters.commands import show_adapter

    card = show_adapter(registry, adapter)
    print(json.dumps(card, indent=2) if json_ else yaml.safe_dump(card, sort_keys=False, allow_unicode=True).rstrip())


@app.command("promote")
def promote(
    adapter: AdapterName,
    alias: Annotated[str, typer.Argument(help="For example prod.")],
    registry: RegistryUrl = "./registry",
    json_: AsJson = False,
) -> None:
    """Point an alias at a version."""
    from gtl.adapters.commands import promote_adapter

    alias = alias.removeprefix("@")
    promoted = promote_adapter(registry, adapter, alias)
    tell(f"@{alias} -> {promoted}", {"adapter": promoted, "alias": alias}, json_)


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="A .safetensors file or a folder: diffusers, PEFT or kohya layout.")],
    model: Annotated[str, typer.Option(help="The base model it was made for.")],
    name: Annotated[str, typer.Option(help="Its name in the registry.")],
    revision: Revision = None,
    variant: Variant = None,
    sampler: Annotated[Sampler, typer.Option(help="lcm: it is for drawing in few steps, as an LCM-LoRA.")] = "model",
    registry: RegistryUrl = "./registry",
    json_: AsJson = False,
) -> None:
    """Publish a LoRA made by others; one whose keys do not all match the model is refused."""
    from gtl.adapters.commands import import_adapter

    card = import_adapter(registry, file, model, name, revision, variant, sampler)
    tell(f"adapter {card.name}@{card.version}", {"adapter": f"{card.name}@{card.version}"}, json_)


@app.command("fuse")
def fuse(
    adapters: Annotated[list[str], typer.Argument(metavar="NAME[@VERSION|@ALIAS][:WEIGHT] ...")],
    name: Annotated[str, typer.Option(help="Of the new adapter.")],
    method: Annotated[str, typer.Option(help=(
        "linear, cat: the sum of the LoRAs, or the mean of whole weights; svd: the sum at a rank; ties, dare_linear, "
        "dare_ties, magnitude_prune: of what is left of each when values are dropped."
    ))] = "linear",
    rank: Annotated[int | None, typer.Option(help="Of svd and what drops values; else the largest LoRA's.")] = None,
    density: Annotated[float | None, typer.Option(help="Share of values that stay; 0.5 when left out.")] = None,
    blocks: Annotated[list[str] | None, typer.Option(
        metavar="PREFIX=FACTOR[,FACTOR...]|FILE",
        help="Of the weights in the layers that begin so: one factor, or one for each adapter; or a YAML file of them.",
    )] = None,
    search: Annotated[str | None, typer.Option(
        metavar="RECIPE", help="Find the weights: those that draw best by this recipe's `evaluate`.",
    )] = None,
    metric: Annotated[str | None, typer.Option(help="Of --search; the recipe's first when left out.")] = None,
    tries: Annotated[int, typer.Option(help="Of --search.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Of what DARE drops, and of weights that are tried.")] = 0,
    registry: RegistryUrl = "./registry",
    json_: AsJson = False,
) -> None:  # fmt: skip
    """Publish one adapter made of several of the same base."""
    from gtl.adapters.commands import fuse_adapters

    if search is not None:
        adapters = best_weights(adapters, method, search, metric, tries, seed, registry)
    with Bar() as bar:
        card = fuse_adapters(registry, adapters, name, method, rank=rank, density=density, blocks=blocks or (),
                             seed=seed, progress=bar)  # fmt: skip
    called, lost = f"{card.name}@{card.version}", card.lineage.fusion.lost if card.lineage.fusion else 0.0
    loss = f"  ({lost:.1%} of the update is lost to the rank)" if lost > 0.0005 else ""
    if json_:
        print(json.dumps({"adapter": called, "lost": lost}))
    else:
        print(f"adapter {called}{loss}")


def best_weights(
    adapters: list[str], method: str, recipe: str, metric: str | None, tries: int, seed: int, registry: str
) -> list[str]:  # fmt: skip
    """The adapters with the weights at which their sum draws best; what was tried goes to stderr.

    Raises:
        UserError: the method is for no sum, one adapter alone draws best, or as for `search_weights`.
    """
    from gtl.config import load_recipe
    from gtl.search.fusion import at, search_weights, table

    if method not in ("linear", "cat", "svd"):
        raise UserError(f"--search: draws with sums of adapters, which --method {method} makes none of; take linear")
    loaded = load_recipe(recipe, [f"storage.registry={json.dumps(registry)}"])
    with Bar() as bar:
        found = search_weights(loaded, adapters, metric, tries=tries, seed=seed, progress=bar)
    print(table(found), file=sys.stderr)
    chosen = at(adapters, found.best)
    if len(chosen) == 1:
        raise UserError(f"nothing was fused: of {tries} weights none drew better than {chosen[0]} alone")
    return chosen


@app.command("export")
def export(
    adapter: AdapterName,
    out: Annotated[Path, typer.Option(help="A new folder.")],
    pipeline: Annotated[bool, typer.Option("--pipeline", help="The whole model with the adapter merged in.")] = False,
    dtype: Annotated[str | None, typer.Option(help="Of the pipeline: fp32, bf16, fp16; else as stored.")] = None,
    registry: RegistryUrl = "./registry",
    json_: AsJson = False,
) -> None:
    """Write an adapter's files, or a diffusers pipeline that has it inside."""
    from gtl.adapters.commands import export_adapter, export_pipeline

    if dtype is not None and not pipeline:
        raise UserError(f"--dtype {dtype}: only with --pipeline; an adapter's own files keep theirs")
    done = export_pipeline(registry, adapter, out, dtype) if pipeline else export_adapter(registry, adapter, out)
    tell(f"{done} -> {out}", {"adapter": done, "out": str(out)}, json_)


@app.command("remove")
def remove(
    adapter: AdapterName,
    force: Annotated[bool, typer.Option("--force", help="Also the aliases that point at it.")] = False,
    registry: RegistryUrl = "./registry",
    json_: AsJson = False,
) -> None:
    """Delete one version."""
    from gtl.adapters.commands import remove_adapter

    removed = remove_adapter(registry, adapter, force)
    tell(f"removed {removed}", {"removed": removed}, json_)
