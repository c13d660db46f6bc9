"""`gtl heads`, `gtl classify` and `gtl features`: what is in pictures, and which are alike."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from gtl.cli.bar import Bar
from gtl.cli.options import AsJson, RegistryUrl
from gtl.types import UserError

app = typer.Typer(no_args_is_help=True, help="Find pictures by their features.")


def heads(
    backbone: Annotated[str, typer.Argument(
        help="builtin:backbone, builtin:pixels, a folder or hub id of a ResNet, ViT or DINOv2, the folder of another "
        "such model, or a diffusion model with a UNet, which stays as it is.",
    )],
    data: Annotated[str, typer.Option(help="Images whose columns say what is in them.")],
    task: Annotated[list[str], typer.Option(
        metavar="NAME[=COLUMN]", help="A head for this column: of metadata.jsonl or a table, folder, or caption.",
    )],
    out: Annotated[Path, typer.Option(help="A new folder for the model.")],
    time: Annotated[float, typer.Option(help="Of a diffusion model: how far to noise pictures are, 0 to 1.")] = 0.25,
    block: Annotated[float, typer.Option(help="Of a diffusion model: behind which share of its blocks.")] = 0.6,
    part: Annotated[str | None, typer.Option(
        help="Of a diffusion model: a text encoder, such as text_encoder; heads then read captions, and see nothing.",
    )] = None,
    seed: Annotated[int, typer.Option(help="Of the heads' first weights.")] = 0,
) -> None:  # fmt: skip
    """Put heads on a network that sees or reads, for objective.type: classify; they have learned nothing yet."""
    from gtl.features.heads import make_heads

    with Bar() as bar:
        tasks = make_heads(
            backbone, data, task, out, cache_url(), time=time, block=block, part=part, seed=seed, progress=bar
        )
    for name, found in tasks.items():
        print(f"{name}: {found.kind} of {', '.join(found.values)}")


def classify(
    images: Annotated[list[str], typer.Argument(
        metavar="IMAGE...", help="Files; for heads on a text encoder, texts.",
    )],
    adapter: Annotated[str, typer.Option(metavar="NAME[@VERSION|@ALIAS]", help="Published heads.")],
    top: Annotated[int, typer.Option(min=1, help="Classes to name, the likeliest.")] = 1,
    registry: RegistryUrl = "./registry",
    json_: AsJson = False,
) -> None:  # fmt: skip
    """Say what is in pictures, or what texts are about, by heads that were trained."""
    from gtl.features.say import say

    with Bar() as bar:
        found = list(say(images, adapter, registry, top, bar))
    if json_:
        print(json.dumps([asdict(each) for each in found], indent=2))
        return
    for each in found:
        answers = [f"{a.label} {a.score:.2f}" + (f" at {a.box}" if a.box else "") for a in each.answers]
        print(f"{each.image}  {each.task}: {', '.join(answers) or 'nothing'}")


@app.command("index")
def index(
    source: Annotated[str, typer.Argument(help="Folder, .parquet, .tar or bucket URL of images.")],
    out: Annotated[Path, typer.Option(help="Folder for the index.")],
    backbone: Annotated[str, typer.Option(
        help="builtin:backbone, or a folder or hub id of a model that sees; of CLIP words find pictures too. Or what "
        "`gtl heads` made: on a diffusion model's middle, or, for pictures to be found by their captions, on its text "
        "encoder.",
    )] = "builtin:backbone",
) -> None:  # fmt: skip
    """Index pictures by their features."""
    from gtl.features.index import make_index

    with Bar() as bar:
        number = make_index(source, out, backbone, cache_url(), bar)
    print(f"{out}: {number} images")


@app.command("find")
def find(
    index: Annotated[Path, typer.Argument(help="Folder of an index.")],
    image: Annotated[str | None, typer.Argument(metavar="[IMAGE]", help="A file.")] = None,
    text: Annotated[str | None, typer.Option(help="Words, instead of an image.")] = None,
    most: Annotated[int, typer.Option("--count", min=1, help="Pictures to find.")] = 10,
    json_: AsJson = False,
) -> None:
    """Find the pictures of an index that are most like one, or like words."""
    from gtl.features.index import find as look

    if (image is None) == (text is None):
        raise UserError("IMAGE, --text: give one of the two")
    found = look(index, image or text or "", text is not None, most)
    if json_:
        print(json.dumps([asdict(match) for match in found], indent=2))
        return
    for match in found:
        print(f"{match.cosine:.4f}  {match.uri}")


def cache_url() -> str:
    """Of commands without a recipe."""
    return os.environ.get("GTL_CACHE", "./cache")
