"""Where a network of transformers is: a folder, or a hub id."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gtl.types import UserError

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def find(spec: str, expected: str) -> Path:
    """The folder, if it is none of the hub; `expected` is for people.

    Raises:
        UserError: there is no such folder, and the hub can have nothing of that name.
    """
    if not is_folder(spec) and (spec.startswith((".", "/", "~")) or not HUB_ID.fullmatch(spec)):
        raise UserError(f"{spec or repr(spec)}: no such folder; {expected}")
    return Path(spec).expanduser()


def is_folder(spec: str) -> bool:
    """Whether there is a folder of that name."""
    try:
        return bool(spec) and Path(spec).expanduser().is_dir()
    except (OSError, RuntimeError):  # a name that is too long, or the home of nobody
        return False


@contextmanager
def explained(spec: str, needed: str) -> Iterator[None]:
    """Within it whatever goes wrong while files are read says that they are not what is needed.

    Raises:
        UserError: so.
    """
    try:
        yield
    except Exception as error:  # folders of other things, and damaged files, make transformers raise nearly anything
        reason = " ".join(str(error).split()).split(". ")[0][:200] or type(error).__name__
        if is_folder(spec):
            raise UserError(f"{spec}: not usable as {needed}: {reason}") from error
        raise UserError(f"{spec}: neither a folder here nor, in the cache or on the hub, {needed}: {reason}") from error
