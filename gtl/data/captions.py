"""Where an image's captions come from."""

from __future__ import annotations

import csv
import io
import json
import posixpath
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from gtl.data.celeba import ATTRIBUTES
from gtl.types import UserError

METADATA_FILES = ("metadata.jsonl", "metadata.csv", ATTRIBUTES)
LABEL_FILES = ("labels.jsonl",)
"""Without captions: for heads, see `gtl.data.labels`."""
TEMPLATE_FIELDS = ("folder", "file")
ORIGINAL = "source_file_name"
"""Key of a metadata file: the image that this one is an edit of, whose caption is then the instruction."""


@dataclass(frozen=True)
class CaptionRule:
    """Which of an image's possible captions count."""

    mode: Literal["auto", "metadata", "sidecar", "folder", "template", "own"] = "auto"
    """As `data.captions`; own: metadata or sidecar."""
    template: str | None = None

    def __post_init__(self) -> None:
        if self.mode == "template" and self.template is None:
            raise UserError("data.caption_template: missing; captions: template needs it, such as `photo of {folder}`")
        try:
            fields = {name for _, name, _, _ in string.Formatter().parse(self.template or "") if name is not None}
        except ValueError as error:
            raise UserError(f"data.caption_template: {self.template!r}: {error}; write {{{{ for a brace") from error
        if unknown := sorted(fields.difference(TEMPLATE_FIELDS)):
            raise UserError(
                f"data.caption_template: {self.template!r}: unknown field {{{unknown[0]}}}; "
                "known are {folder} and {file}"
            )

        try:
            (self.template or "").format(folder="", file="")
        except ValueError as error:
            raise UserError(f"data.caption_template: {self.template!r}: {error}; use {{folder}}") from error

    @classmethod
    def fixed(cls, caption: str) -> CaptionRule:
        """The same caption for every image."""
        return cls("template", caption.replace("{", "{{").replace("}", "}}"))

    @property
    def reads_metadata(self) -> bool:
        """Whether metadata files count."""
        return self.mode in ("auto", "own", "metadata")

    @property
    def reads_sidecars(self) -> bool:
        """Whether text files beside the images count."""
        return self.mode in ("auto", "own", "sidecar")

    def choose(
        self, image: str, folder: str, metadata: Sequence[str] | None, sidecar: Sequence[str] | None
    ) -> tuple[str, ...]:
        """An image's captions; () if the rule gives it none.

        Args:
            image: Its path, for {file}.
            folder: Name of the folder it lies in, for {folder} and as the last resort.
            metadata: Captions that a metadata file, a table's column or a tar member gives it; None without.
            sidecar: Lines of the text file beside it; None without.
        """
        if self.reads_metadata and metadata is not None:
            return tuple(metadata)
        if self.reads_sidecars and sidecar is not None:
            return tuple(sidecar) or ("",)
        if self.mode == "template" or (self.mode == "auto" and self.template is not None):
            assert self.template is not None
            stem = posixpath.splitext(posixpath.basename(image))[0]
            return (self.template.format(folder=readable(folder), file=readable(stem)),)
        return (readable(folder),) if self.mode in ("auto", "folder") else ()


def readable(name: str) -> str:
    """A file or folder name as words."""
    return name.replace("_", " ").strip()


def split_lines(text: str) -> list[str]:
    """Captions of a text file, one a line."""
    return [line.strip() for line in text.splitlines() if line.strip()]


class Row(NamedTuple):
    """A line of a metadata file."""

    line: int
    name: str
    """Of the image, as `original` relative to the file."""
    captions: list[str]
    original: str | None
    """The image that it is an edit of."""


def read_metadata(data: bytes, url: str) -> Iterator[Row]:
    """The lines of a metadata.jsonl or metadata.csv; `text` is one caption or a list of them.

    Raises:
        UserError: naming file and line, when one cannot be understood.
    """
    for number, row in rows_of(data, url):
        if not isinstance(row, dict) or not isinstance(name := row.get("file_name"), str) or not name:
            raise UserError(f"{url}:{number}: no file_name in it; a line needs file_name and text")
        captions = row.get("text")
        captions = [captions] if isinstance(captions, str) else captions
        if not isinstance(captions, list) or not captions or not all(isinstance(c, str) for c in captions):
            raise UserError(f"{url}:{number}: no text in it; a line needs file_name and text (one caption or a list)")
        original = row.get(ORIGINAL) or None
        if not isinstance(original, str | None):
            raise UserError(f"{url}:{number}: {ORIGINAL}: {original!r}: expected the name of an image file")
        if not is_text("".join([name, *captions, original or ""])):
            raise UserError(f"{url}:{number}: half a character in it (a \\ud... escape without its other half)")
        yield Row(number, posixpath.normpath(name), captions, original and posixpath.normpath(original))


def rows_of(data: bytes, url: str) -> Iterator[tuple[int, Any]]:
    """(line, row) of a file of JSON lines, or of a .csv.

    Raises:
        UserError: naming file and line, when one cannot be understood.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{url}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    yield from _csv_rows(text, url) if url.endswith(".csv") else _jsonl_rows(text, url)


def is_text(value: str) -> bool:
    """Whether it can be stored: JSON may escape half a character, which no encoding has."""
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _csv_rows(text: str, url: str) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise UserError(f"{url}:{reader.line_num}: not valid CSV ({error})") from error


def _jsonl_rows(text: str, url: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise UserError(f"{url}:{number}: not valid JSON ({error})") from error
