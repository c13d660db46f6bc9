"""What heads learn to say of images: columns of metadata files and tables, folders' names, captions."""

from __future__ import annotations

import json
import logging
import math
import posixpath
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gtl.data.captions import rows_of
from gtl.data.celeba import ATTRIBUTES
from gtl.storage import Store, explained
from gtl.types import Task, UserError

if TYPE_CHECKING:
    from gtl.data.sources import Listing, Located, Scan

FOLDER, CAPTION = "folder", "caption"
"""Columns that every image has: the name of its folder, and its first caption."""
NOTHING: Mapping[str, Any] = {}

logger = logging.getLogger(__name__)

Labels = Mapping[str, Any]
"""An image's values by column."""


def read_labels(listing: Listing, columns: Collection[str]) -> dict[str, list[Labels]]:
    """By key of a source file the labels of its images: of an image file one, of a table one a row.

    Raises:
        UserError: a file cannot be understood.
    """
    wanted = [column for column in columns if column not in (FOLDER, CAPTION)]
    found: dict[str, list[Labels]] = {}
    if not wanted:
        return found
    for key in [*listing.metadata, *listing.labels]:
        if posixpath.basename(key) != ATTRIBUTES:
            for _, row in rows_of(listing.store.read(key), listing.store.url(key)):
                if isinstance(row, dict) and isinstance(name := row.get("file_name"), str):
                    image = posixpath.normpath(posixpath.join(posixpath.dirname(key), name))
                    (own,) = found.setdefault(image, [{}])
                    found[image] = [{**own, **{column: row[column] for column in wanted if column in row}}]
    for key in listing.containers:
        if key.lower().endswith(".parquet"):
            found[key] = read_table(listing.store, key, wanted)
    return found


def read_table(store: Store, key: str, wanted: Sequence[str]) -> list[Labels]:
    """Of every row of a Parquet file; {} where it has none of the columns."""
    import pyarrow as pa
    from pyarrow import parquet

    with explained(store.url(key)), store.fs.open_input_file(store.path(key)) as file:
        try:
            table = parquet.ParquetFile(file)
            there = [column for column in wanted if column in table.schema_arrow.names]
            rows: list[Labels] = table.read(columns=there).to_pylist() if there else []
            return rows or [{}] * table.metadata.num_rows
        except pa.ArrowInvalid:  # of which `gtl.data.containers` makes broken images
            return []


def labels_of(labels: Labels, columns: Collection[str], folder: str, captions: Sequence[str]) -> str:
    """What a record keeps: the columns that it has, as JSON; numbers and truth values as text."""
    given = {**labels, FOLDER: folder, **({CAPTION: captions[0]} if captions else {})}
    kept = {column: plain(given[column]) for column in columns if given.get(column) is not None}
    return json.dumps(kept, sort_keys=True, ensure_ascii=False)


def plain(value: Any) -> Any:
    """A value as JSON holds it; one of a class is text."""
    if isinstance(value, (bool, int, float)):
        return json.dumps(value)
    if isinstance(value, Mapping):
        return {str(key): plain_list(each) for key, each in value.items()}
    return str(value)


def plain_list(value: Any) -> Any:
    """The same of what is inside of a column of boxes, where numbers stay."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return [plain_list(each) for each in value] if isinstance(value, (list, tuple)) else value


def check_labels(found: Scan, tasks: Mapping[str, Task]) -> None:
    """Keep the images that at least one task has a label of, and refuse labels that the heads do not know.

    Raises:
        UserError: names the image, the column and what is allowed.
    """
    columns = {task.column for task in tasks.values()}
    kept: list[Located] = []
    there: Counter[str] = Counter()
    for located in found.images:
        labels = json.loads(located.record.labels or "{}")
        for name, task in tasks.items():
            if (value := labels.get(task.column)) is not None:
                check_label(value, name, task, located)
                there[name] += 1
        if labels:
            kept.append(located)
    for name, task in tasks.items():
        if not there[name]:
            raise UserError(f"data.source: no image has a {task.column}, which the model's head {name} learns to say")
    if left := len(found.images) - len(kept):
        logger.warning("%d of %d images have no %s; left out", left, len(found.images), " or ".join(sorted(columns)))
    found.images = kept


def check_turned(tasks: Mapping[str, Task], flip: bool) -> None:
    """Refuse mirrored pictures where boxes would stay where they were.

    Raises:
        UserError: so it is.
    """
    if flip and (boxed := next((name for name, task in tasks.items() if task.kind == "boxes"), None)) is not None:
        raise UserError(f"data.flip: true: the boxes of the model's head {boxed} are not mirrored with it; set false")


def check_label(value: Any, name: str, task: Task, located: Located) -> None:
    """Refuse what a head cannot learn to say.

    Raises:
        UserError: names the image and the column.
    """
    where = f"{located.record.uri}: {task.column}"
    classes = [value]
    if task.kind == "boxes":
        boxes = boxes_of(value, where)
        height, width = located.record.size
        for _, (x, y, w, h) in boxes:
            if min(w, h) <= 0 or min(x, y) < 0 or x + w > width + 0.5 or y + h > height + 0.5:
                raise UserError(
                    f"{where}: box [{x:g}, {y:g}, {w:g}, {h:g}]: expected x, y, width, height inside {width} x {height}"
                )
        classes = [kind for kind, _ in boxes]
    for kind in classes:
        if kind not in task.values:
            raise UserError(f"{where}: {kind!r}: the model's head {name} knows {', '.join(task.values)}")


def boxes_of(value: Any, where: str) -> list[tuple[str, tuple[float, float, float, float]]]:
    """(class, (x, y, width, height) in pixels) of every object of a column of boxes.

    As Hugging Face's imagefolder has them: {"bbox": [[x, y, width, height], ...], "categories": [...]}.

    Raises:
        UserError: it is none.
    """
    expected = f'{where}: expected {{"bbox": [[x, y, width, height], ...], "categories": [...]}}'
    if not isinstance(value, dict) or not isinstance(value.get("bbox"), list):
        raise UserError(expected)
    kinds = value.get("categories", value.get("category"))
    if not isinstance(kinds, list) or len(kinds) != len(value["bbox"]):
        raise UserError(expected)
    found = []
    for kind, box in zip(kinds, value["bbox"], strict=True):
        if (
            not isinstance(box, list)
            or len(box) != 4
            or not all(isinstance(n, (int, float)) and math.isfinite(n) for n in box)
        ):
            raise UserError(expected)
        x, y, w, h = map(float, box)
        found.append((str(kind), (x, y, w, h)))
    return found


def find_tasks(found: Scan, wanted: Mapping[str, str], source: str) -> dict[str, Task]:
    """The tasks that columns are good for, by name; classes in the order of the alphabet.

    Args:
        found: Labelled images.
        wanted: Column by task.
        source: Of the images, for messages.

    Raises:
        UserError: no image has the column, or all have the same class.
    """
    tasks = {}
    labels = [(located, json.loads(located.record.labels or "{}")) for located in found.images]
    for name, column in wanted.items():
        values = [(located, own[column]) for located, own in labels if column in own]
        if not values:
            raise UserError(f"--task {name}: no image of {source} has a column {column!r}")
        is_boxes = isinstance(values[0][1], dict)
        kinds: set[str] = set()
        for located, value in values:
            where = f"{located.record.uri}: {column}"
            if isinstance(value, dict) != is_boxes:
                raise UserError(f"{where}: {value!r}: other images have {'boxes' if is_boxes else 'one class'} there")
            kinds.update(kind for kind, _ in boxes_of(value, where)) if is_boxes else kinds.add(value)
        if not kinds or (len(kinds) < 2 and not is_boxes):
            only = f"all have {kinds.pop()!r}; there have to be two classes" if kinds else "there is no object"
            raise UserError(f"--task {name}: {len(values)} images of {source} have a {column}, and {only}")
        tasks[name] = Task(column, "boxes" if is_boxes else "class", tuple(sorted(kinds)))
    return tasks
