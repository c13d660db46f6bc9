"""Arguments and options that several commands have."""

from typing import Annotated

import typer

Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one key of the file.")]
RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file (YAML), or its bucket URL.")]
RegistryUrl = Annotated[str, typer.Option("--registry", envvar="GTL_REGISTRY", help="Folder or bucket URL.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
Variant = Annotated[str | None, typer.Option(help="Of the model's weight files, for example fp16.")]
Steps = Annotated[int | None, typer.Option(help="Left out: 25, or 4 with an adapter for few steps.")]
Guidance = Annotated[float | None, typer.Option(
    help="Classifier-free guidance scale; 1 is off. Left out: 7.5, or 1 with an adapter for few steps.",
)]  # fmt: skip
AdapterName = Annotated[str, typer.Argument(metavar="NAME[@VERSION|@ALIAS]")]
