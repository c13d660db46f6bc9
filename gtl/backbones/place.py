"""Where a network of transformers is: a folder, or a hub id."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gtl.types import UserError

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def source_of(spec: str, expected: str) -> str:
    """What transformers opens: the path of a folder that is here, else an id of the hub.

    Args:
        spec: A folder, also below `~`, or a hub id.
        expected: What it should be, for people.

    Raises:
        UserError: there is no such folder, and the hub can have nothing of that name.
    """
    if is_folder(spec):
        return str(Path(spec).expanduser())
    if spec.startswith((".", "/", "~")) or not HUB_ID.fullmatch(spec):
        raise UserError(f"{spec or repr(spec)}: no such folder; {expected}")
    return spec


def is_folder(spec: str) -> bool:
    """Whether there is a folder of that name."""
    try:
        return bool(spec) and Path(spec).expanduser().is_dir()
    except (OSError, RuntimeError):  # a name that is too long, or the home of nobody
        return False


@contextmanager
def explained(spec: str, needed: str) -> Iterator[None]:
    """Within it files are opened; what goes wrong is told as one line.

    Raises:
        UserError: the files are not what is needed.
    """
    try:
        yield
    except Exception as error:  # folders of other things, and damaged files, make transformers raise nearly anything
        if is_folder(spec):
            raise UserError(f"{spec}: not usable as {needed}: {reason(error)}") from error
        where = "neither a folder here nor, in the cache or on the hub,"
        raise UserError(f"{spec}: {where} {needed}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """The first sentence of an error, on one line."""
    return " ".join(str(error).split()).split(". ")[0][:200] or type(error).__name__
