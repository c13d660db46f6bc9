"""`gtl generate` and `gtl edit`: pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gtl.cli.bar import Bar
from gtl.cli.options import Guidance, RegistryUrl, Revision, Steps, Variant


def generate(
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")],
    model: Annotated[str | None, typer.Option(help="Base model; the adapter's own when left out.")] = None,
    revision: Revision = None,
    variant: Variant = None,
    adapter: Annotated[list[str] | None, typer.Option(metavar="NAME[@VERSION|@ALIAS][:SCALE]")] = None,
    prompt: Annotated[str | None, typer.Option()] = None,
    prompts: Annotated[Path | None, typer.Option(help="One prompt a line, or .jsonl.")] = None,
    negative_prompt: Annotated[str, typer.Option()] = "",
    seed: Annotated[int, typer.Option(help="Image i uses seed + i.")] = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    width: Annotated[int | None, typer.Option(help="Pixels; the model's own when left out.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; the model's own when left out.")] = None,
    count: Annotated[int, typer.Option(help="Images per prompt.")] = 1,
    workers: Annotated[
        str | None, typer.Option(metavar="N|auto", help="Draw on a Ray cluster, a GPU each; here when left out.")
    ] = None,
    upscaler: Annotated[str | None, typer.Option(
        metavar="MODEL", help="Second stage of a cascade, which enlarges what the model draws to width and height.",
    )] = None,
    upscaler_adapter: Annotated[list[str] | None, typer.Option(metavar="NAME[@VERSION|@ALIAS][:SCALE]")] = None,
    upscaler_guidance: Annotated[float, typer.Option(help="Of the second stage.")] = 4.0,
    registry: RegistryUrl = "./registry",
) -> None:  # fmt: skip
    """Draw pictures with a base model and any adapters of the registry."""
    from gtl.generate.command import Enlarged, run
    from gtl.types import UserError

    if upscaler is None and upscaler_adapter:
        raise UserError(f"--upscaler-adapter: {upscaler_adapter[0]}: there is no --upscaler that it would be for")
    second = None if upscaler is None else Enlarged(upscaler, upscaler_adapter or [], upscaler_guidance, variant)
    with Bar() as bar:
        paths = run(out=out, model=model, revision=revision, variant=variant, adapters=adapter or [], prompt=prompt,
                    prompts=prompts, negative_prompt=negative_prompt, seed=seed, steps=steps, guidance=guidance,
                    width=width, height=height, count=count, registry=registry, workers=workers, upscaler=second,
                    progress=bar)  # fmt: skip
    for path in paths:
        print(path)


def edit(
    image: Annotated[Path, typer.Argument(
        metavar="IMAGE", help="What to begin at. If its sides are no multiples of what the model needs, or it is "
        "larger than the model draws by itself, it is resized and cut at the centre, as in training.",
    )],
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")],
    prompt: Annotated[str, typer.Option()],
    mask: Annotated[Path | None, typer.Option(
        help="Of the image's size; what is transparent in it, or else white, is drawn anew, and the rest stays. "
        "Without one, what is transparent in the image is.",
    )] = None,
    extend: Annotated[str | None, typer.Option(
        metavar="LEFT,TOP,RIGHT,BOTTOM", help="Draw so many pixels beyond the image's edges, or one number for all "
        "four, and some more if the model needs them; the image's own pixels stay.",
    )] = None,
    strength: Annotated[float | None, typer.Option(
        help="How far to go from the image: the share of the steps taken. Left out: 0.8.",
    )] = None,
    invert: Annotated[str | None, typer.Option(
        metavar="TEXT", help="What the image shows: it is drawn from the noise that draws that, and keeps more of its "
        "structure than without. Choose a low --guidance, such as 3.",
    )] = None,
    image_guidance: Annotated[float | None, typer.Option(
        help="With an adapter that was taught to edit: how close to stay to the image; 1 is off. Left out: 1.5.",
    )] = None,
    colors_of: Annotated[Path | None, typer.Option(
        metavar="IMAGE", help="Give what is drawn the colours of another picture, or of IMAGE itself: the mean and the "
        "deviation of each.",
    )] = None,
    model: Annotated[str | None, typer.Option(help="Base model; the adapter's own when left out.")] = None,
    revision: Revision = None,
    variant: Variant = None,
    adapter: Annotated[list[str] | None, typer.Option(metavar="NAME[@VERSION|@ALIAS][:SCALE]")] = None,
    negative_prompt: Annotated[str, typer.Option()] = "",
    seed: Annotated[int, typer.Option(help="Image i uses seed + i.")] = 0,
    steps: Annotated[int | None, typer.Option(
        help="From noise; strength says how many are taken. Left out: 25, or 4 with an adapter for few steps.",
    )] = None,
    guidance: Guidance = None,
    width: Annotated[int | None, typer.Option(help="Pixels; the image's own, if they fit the model.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; the image's own, if they fit the model.")] = None,
    count: Annotated[int, typer.Option(help="Images.")] = 1,
    registry: RegistryUrl = "./registry",
) -> None:  # fmt: skip
    """Draw pictures that begin at an image, or in it anew what a mask marks."""
    from gtl.generate.edit_command import run

    with Bar() as bar:
        paths = run(image, out=out, prompt=prompt, mask=mask, extend=extend, strength=strength, invert=invert,
                    image_guidance=image_guidance, colors_of=colors_of, model=model, revision=revision,
                    variant=variant, adapters=adapter or [], negative_prompt=negative_prompt, seed=seed, steps=steps,
                    guidance=guidance, width=width, height=height, count=count, registry=registry,
                    progress=bar)  # fmt: skip
    for path in paths:
        print(path)
