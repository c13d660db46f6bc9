"""The attributes of CelebA (Liu et al. 2015, arXiv 1411.7766) as captions of its pictures.

`list_attr_celeba.txt` begins with the number of its lines and the attributes' names; a line has a file's name and 1 or
-1 for each attribute. The pictures are in a folder `img_align_celeba`, beside it or elsewhere in the source.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator

from gtl.types import UserError

ATTRIBUTES = "list_attr_celeba.txt"
PICTURES = "img_align_celeba"


def captions_of(data: bytes, url: str, keys: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(key, caption) of those pictures among the `keys` that the attributes are of.

    Raises:
        UserError: naming file and line, when one cannot be understood.
    """
    pictures = {posixpath.basename(key): key for key in keys if posixpath.basename(posixpath.dirname(key)) == PICTURES}
    lines = data.decode("utf-8", "replace").splitlines()
    if len(lines) < 2 or not lines[0].strip().isdigit():
        raise UserError(f"{url}:1: expected the number of lines, as list_attr_celeba.txt begins with it")
    names = lines[1].split()
    for number, line in enumerate(lines[2:], 3):
        if not (fields := line.split()):
            continue
        file, *values = fields
        if len(values) != len(names) or set(values) - {"1", "-1"}:
            raise UserError(f"{url}:{number}: {file}: expected 1 or -1 for each of {len(names)} attributes")
        if file in pictures:
            present = [name for name, value in zip(names, values, strict=True) if value == "1"]
            yield pictures[file], describe(present)


def describe(attributes: Iterable[str]) -> str:
    """A caption of a face with these attributes: a photo of a face, black hair, smiling."""
    return ", ".join(["a photo of a face", *(name.replace("_", " ").lower() for name in attributes)])
