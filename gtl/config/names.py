"""Names, versions and references: the one spelling of NAME@VERSION, NAME@ALIAS and :SCALE."""

import datetime
import hashlib
import math
import re
from typing import NamedTuple

from gtl.types import UserError

NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


class Reference(NamedTuple):
    """An adapter as a user writes it: NAME, NAME@VERSION or NAME@ALIAS, optionally with :SCALE."""

    name: str
    version: str | None
    """A version or an alias; None for the newest."""
    scale: float

    def __str__(self) -> str:
        version = "" if self.version is None else f"@{self.version}"
        return f"{self.name}{version}" + ("" if self.scale == 1 else f":{self.scale:g}")


def check_name(name: str, what: str = "name") -> str:
    """Return the name.

    Raises:
        UserError: it holds other than lower-case letters, digits, dot, dash and underscore.
    """
    if not NAME.fullmatch(name):
        raise UserError(f"{what}: {name!r}: a name starts with a-z or 0-9 and goes on with a-z, 0-9, '.', '_' or '-'")
    return name


def parse_reference(text: str) -> Reference:
    """Read `NAME[@VERSION|@ALIAS][:SCALE]`.

    Raises:
        UserError: it is none.
    """
    body, colon, scale = text.partition(":")
    name, at, version = body.partition("@")
    try:
        number = float(scale) if colon else 1.0
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"adapter {text!r}: the part after ':' is its scale, a number, for example {body}:0.8")
    check_name(name, f"adapter {text!r}")
    if at:
        check_name(version, f"adapter {text!r}: version or alias")
    return Reference(name, version if at else None, number)


def new_version(content: str) -> str:
    """A sortable time stamp (UTC, to the millisecond) and a short hash of it and the content."""
    now = datetime.datetime.now(datetime.timezone.utc)
    digest = hashlib.sha256(f"{now.timestamp()}{content}".encode()).hexdigest()[:6]
    return now.strftime("%Y%m%d-%H%M%S-%f")[:-3] + f"-{digest}"
