"""What to draw, as the command line gives it: one prompt, or a file of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from gtl.config.base import Section
from gtl.types import UserError


class Prompt(Section):
    """One line of a .jsonl prompts file; None leaves a field to the command line."""

    prompt: str
    negative_prompt: str | None = None
    seed: Annotated[int, Field(ge=0)] | None = None


def read_prompts(prompt: str | None, file: Path | None) -> list[Prompt]:
    """The prompts of `--prompt`, or of `--prompts`: one a line, or in a .jsonl file one object a line.

    Raises:
        UserError: both or none are given, or the file cannot be read, is empty, or has a wrong line.
    """
    if (prompt is None) == (file is None):
        found = "neither" if file is None else "both"
        raise UserError(f"--prompt: {found} of --prompt and --prompts given; expected one of them")
    if file is None:
        assert prompt is not None
        try:
            prompt.encode()
        except UnicodeEncodeError:  # bytes of the command line that were not text
            raise UserError(f"--prompt: {prompt!r}: not UTF-8 text") from None
        return [Prompt(prompt=prompt)]
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # JSON may hold other ends of lines
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts {file}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise UserError(f"--prompts {file}: cannot be read: {error.strerror}") from error
    read = _json_line if file.suffix == ".jsonl" else _text_line
    prompts = [read(line, f"--prompts {file}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise UserError(f"--prompts {file}: no prompt in it; expected one a line")
    return prompts


def _text_line(line: str, where: str) -> Prompt:
    return Prompt(prompt=line.strip())


def _json_line(line: str, where: str) -> Prompt:
    try:
        return Prompt.model_validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = "".join(f" {part}:" for part in first["loc"])
        raise UserError(f"{where}:{key} {first['msg']}; fields: {', '.join(Prompt.model_fields)}") from None
