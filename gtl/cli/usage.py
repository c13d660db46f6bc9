"""A command line that cannot be parsed, in one line."""

from __future__ import annotations

from typing import Any

import typer

UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""Of typer's own click, or of click itself where typer still has none."""


def explain(error: Any) -> str:
    """Which option or argument, its value, what would be right, and where all of them are listed."""
    message, said = str(error.message), str(error.format_message())
    value = value_of(error)
    if value is not None and repr(value) not in said:
        said = f"{said.removesuffix(message)}{value!r}: {message}"
    said = " ".join(said.split()).rstrip(".")
    where = f"{path_of(error.ctx)} --help" if error.ctx is not None else "--help of the command"
    return f"{said}{'' if said.endswith('?') else ';'} see {where}"


def value_of(error: Any) -> Any:
    """What was given in place of what is allowed, if the parser tells."""
    refused = getattr(error.__cause__, "errors", None)
    return refused()[0]["input"] if refused is not None else None


def path_of(context: Any) -> str:
    """The command as it is typed; what `gtl submit` sends is a command of its own."""
    names: list[str] = []
    while context is not None and not (names and context.info_name == "submit"):
        names = [context.info_name, *names]
        context = context.parent
    return " ".join(names if names[0] == "gtl" else ["gtl", *names])
