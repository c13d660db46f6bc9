"""`gtl heads`: models that say what is in pictures."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from gtl.cli.bar import Bar


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
    time: Annotated[float, typer.Option(help="Of a diffusion model: how far to noise pictures are, 0 to 1.")] = 0.1,
    block: Annotated[float, typer.Option(help="Of a diffusion model: behind which share of its blocks.")] = 0.6,
    seed: Annotated[int, typer.Option(help="Of the heads' first weights.")] = 0,
) -> None:  # fmt: skip
    """Put heads on a network that sees, for objective.type: classify; they have learned nothing yet."""
    from gtl.features.heads import make_heads

    with Bar() as bar:
        tasks = make_heads(backbone, data, task, out, os.environ.get("GTL_CACHE", "./cache"), time=time, block=block,
                           seed=seed, progress=bar)  # fmt: skip
    for name, found in tasks.items():
        print(f"{name}: {found.kind} of {', '.join(found.values)}")
