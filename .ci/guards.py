"""Checks of single files for pre-commit: `python .ci/guards.py GUARD FILE ...` names the offenders and exits with 1."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

LIMIT = 250 * 1000
PRIVATE_KEY = re.compile(rb"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----")


def end_of_file(data: bytes) -> str | None:
    """A text file is empty or ends with exactly one newline."""
    if not data or (data.endswith(b"\n") and not data.endswith(b"\n\n")):
        return None
    return "does not end with exactly one newline"


def size(data: bytes) -> str | None:
    """What is large belongs into a store, not into the history."""
    return f"{len(data)} bytes, above {LIMIT}" if len(data) > LIMIT else None


def private_key(data: bytes) -> str | None:
    """A key that was committed once is public for good."""
    return "holds a private key" if PRIVATE_KEY.search(data) else None


GUARDS: dict[str, Callable[[bytes], str | None]] = {
    "end-of-file": end_of_file,
    "size": size,
    "private-key": private_key,
}


def main(name: str, *files: str) -> int:
    """Run one guard over the files; the exit status."""
    complaints = [f"{file}: {word}" for file in files if (word := GUARDS[name](Path(file).read_bytes()))]
    print(*complaints, sep="\n", end="\n" if complaints else "")
    return bool(complaints)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
