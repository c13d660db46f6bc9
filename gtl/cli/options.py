"""Arguments and options that several commands have."""

from typing import Annotated

import typer

Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one key of the recipe.")]
RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file (YAML), or its bucket URL.")]
RegistryUrl = Annotated[str, typer.Option("--registry", envvar="GTL_REGISTRY", help="Folder or bucket URL.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
Variant = Annotated[str | None, typer.Option(help="Of the model's weight files, for example fp16.")]
AdapterName = Annotated[str, typer.Argument(metavar="NAME[@VERSION|@ALIAS]")]
