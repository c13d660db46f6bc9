"""Heads for what the columns of some data say, on a network that sees."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gtl.data.captions import CaptionRule
from gtl.data.check import inspect_here
from gtl.data.labels import CAPTION, find_tasks
from gtl.data.sources import scan
from gtl.families.classifier_blank import (
    PIXELS,
    SCENES,
    write_classifier,
    write_diffusion_classifier,
    write_text_classifier,
)
from gtl.families.files import INDEX, read_json, write_once
from gtl.storage import Store
from gtl.types import Progress, Task, UserError, quiet

TIME, BLOCK = 0.25, 0.6
"""Where a diffusion model is looked at: late, when only details are open, and behind its middle, about as DIFT does."""


def make_heads(
    source: str, data: str, wanted: Sequence[str], out: Path, cache: str, *, time: float = TIME, block: float = BLOCK,
    part: str | None = None, seed: int = 0, progress: Progress = quiet,
) -> dict[str, Task]:  # fmt: skip
    """Write a model whose heads are to say what columns of the data say; they have learned nothing yet.

    Args:
        source: A diffusion model in diffusers layout, of which the middle is looked at; or see
            `gtl.families.classifier_blank.write_classifier`.
        data: Where the images are; of these only the columns are read.
        wanted: NAME or NAME=COLUMN of each task.
        out: A new folder.
        cache: URL of its root, which remembers what was found in files.
        time: Of a diffusion model: how far on the way to noise pictures are looked at, from 0 to 1.
        block: Of a diffusion model: behind which share of its blocks, from 0 to 1.
        part: Of a diffusion model: a text encoder, whose features of captions the heads are to stand on instead.
        seed: Of the heads' weights.
        progress: Is called as it goes on.

    Raises:
        UserError: there is no such network, part or column, or the folder holds something.
    """
    columns = columns_of(wanted)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out}: is not empty; give a new folder")
    rule = CaptionRule("auto" if CAPTION in columns.values() else "folder")
    found = scan(data, rule, 1.0, Store(cache), inspect_here, progress, sorted(set(columns.values())))
    tasks = find_tasks(found, columns, data)
    progress("heads", 0, 0, source)

    def write(folder: Path) -> None:
        if part is not None:
            write_text_classifier(source, part, tasks, folder, seed)
        elif is_diffusion(source):
            write_diffusion_classifier(source, tasks, folder, time, block, seed)
        else:
            write_classifier(source, tasks, folder, seed)

    write_once(out, write)
    return tasks


def is_diffusion(source: str) -> bool:
    """Whether a source is a model in diffusers layout that is no classifier itself."""
    if source in (PIXELS, SCENES):
        return False
    if source.startswith("builtin:") or "://" in source:
        return True
    index = Path(source).expanduser() / INDEX
    return index.is_file() and read_json(index).get("_class_name") != "ClassifierPipeline"


def columns_of(wanted: Sequence[str]) -> dict[str, str]:
    """Column by task.

    Raises:
        UserError: a name is none, or is given twice.
    """
    found: dict[str, str] = {}
    for text in wanted:
        name, mark, column = text.partition("=")
        if not name.isidentifier() or (mark and not column):
            raise UserError(f"--task {text}: expected NAME or NAME=COLUMN, such as label=folder; a name has no spaces")
        if name in found:
            raise UserError(f"--task {text}: {name} is given twice; keep one")
        found[name] = column or name
    if not found:
        raise UserError("--task: missing; name a column of the data, such as label, or label=folder")
    return found
