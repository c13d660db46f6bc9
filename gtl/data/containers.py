"""Looking into source files: what images they hold, and the bytes of one of them."""

from __future__ import annotations

import hashlib
import json
import posixpath
import tarfile
from functools import lru_cache
from typing import Any, NamedTuple

from gtl.data.captions import is_text, split_lines
from gtl.data.cifar import PIXELS, RECORD, split_records, to_ppm
from gtl.data.index import GONE, Seen, SeenFile
from gtl.images import EXTENSIONS, BrokenImage, probe
from gtl.storage import Store, explained
from gtl.types import UserError

CONTAINERS = frozenset({".parquet", ".tar", ".bin"})
"""Endings; of .bin those of CIFAR-10."""
MAX_BYTES = 2**28
"""A compressed image larger than this is refused unread."""
IMAGE_COLUMNS = ("edited_image", "image", "img", "jpg", "jpeg", "png", "webp", "bytes")
TEXT_COLUMNS = ("text", "caption", "captions", "prompt", "txt", "edit_prompt")
ORIGINAL_COLUMNS = ("original_image", "input_image", "source_image")
"""Of images that those of another column are edits of, as published sets of instructions name them."""


class Place(NamedTuple):
    """Where an image's bytes are."""

    root: str
    key: str
    offset: int
    length: int
    row: int
    column: str = ""
    """Of a table, where it is not that of its images."""


def inspect(root: str, key: str, num_bytes: int, mtime: int) -> SeenFile:
    """Read a source file once: hashes, sizes and captions of its images, or the text of a caption file.

    Images are only probed (see `gtl.images.probe`), so that a damaged one may pass and fail in the decoder later. A
    file that cannot be understood is an image with an error.

    Raises:
        UserError: the store cannot be reached, or a table lacks an image column.
    """
    store, extension = Store(root), posixpath.splitext(key)[1].lower()
    try:
        if extension == ".txt":
            return _caption_file(store.url(key), num_bytes, mtime, store.read(key))
        if extension == ".tar":
            images = inspect_tar(store, key)
        elif extension == ".parquet":
            images = inspect_parquet(store, key)
        elif extension == ".bin":
            images = inspect_cifar(store.read(key))
        elif num_bytes > MAX_BYTES:
            images = [broken(f"{num_bytes} bytes, more than the allowed {MAX_BYTES}")]
        else:
            images = [look(store.read(key), "", None)]
    except FileNotFoundError:
        images = [broken(GONE)]
    return SeenFile(store.url(key), num_bytes, mtime, tuple(images))


def look(
    data: bytes, name: str, captions: tuple[str, ...] | None, offset: int = 0, length: int = -1, row: int = -1
) -> Seen:
    """Hash and size of one image, or why it has none; see `gtl.images.probe`."""
    digest = hashlib.sha256(data).hexdigest()
    try:
        height, width = probe(data)
    except BrokenImage as error:
        return Seen(name, digest, 0, 0, str(error), captions, offset, length, row)
    return Seen(name, digest, height, width, "", captions, offset, length, row)


def broken(reason: str, name: str = "") -> Seen:
    """An image that cannot be read at all."""
    return Seen(name, "", 0, 0, reason, None)


def _caption_file(url: str, num_bytes: int, mtime: int, data: bytes) -> SeenFile:
    try:
        return SeenFile(url, num_bytes, mtime, text=data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return SeenFile(url, num_bytes, mtime, (broken(_not_utf8(error)),))


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 text ({error.reason} at byte {error.start})"


def inspect_tar(store: Store, key: str) -> list[Seen]:
    """Images of a WebDataset shard in one pass; `a.jpg` takes its captions from `a.txt` or `a.json`.

    Beside `a.jpg`, `a.mask.png` is another field of that sample and no image of its own.
    """
    images: list[tuple[str, Seen]] = []
    captions: dict[str, tuple[str, ...] | str] = {}
    with explained(store.url(key)), store.fs.open_input_stream(store.path(key)) as stream:
        try:
            # r| never seeks: a shard in a bucket is read in one go.
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                for member in tar:
                    _take_member(tar, member, images, captions)
        except (tarfile.TarError, EOFError) as error:
            images.append(("", broken(f"not a whole tar file ({error})")))
    samples = {stem for stem, _ in images if stem == _sample(stem)}
    own = [(stem, image) for stem, image in images if stem == _sample(stem) or _sample(stem) not in samples]
    return [_with_captions(image, captions.get(stem, captions.get(_sample(stem)))) for stem, image in own]


def _sample(stem: str) -> str:
    """A member's name up to its first dot, which is what the parts of a WebDataset sample have in common."""
    folder, base = posixpath.split(stem)
    return posixpath.join(folder, base.partition(".")[0])


def _with_captions(image: Seen, captions: tuple[str, ...] | str | None) -> Seen:
    """The image with its captions, or with the reason why they cannot be read."""
    if isinstance(captions, str):
        return image._replace(error=image.error or captions)
    return image._replace(captions=captions)


def _take_member(
    tar: tarfile.TarFile, member: tarfile.TarInfo, images: list[tuple[str, Seen]],
    captions: dict[str, tuple[str, ...] | str],
) -> None:  # fmt: skip
    stem, ending = posixpath.splitext(member.name)
    extension, is_hidden = ending.lower(), posixpath.basename(stem).startswith(".")
    if not member.isfile() or is_hidden or extension not in EXTENSIONS | {".txt", ".json"}:
        return
    if member.size > MAX_BYTES:
        images.append((stem, broken(f"{member.size} bytes, more than the allowed {MAX_BYTES}", member.name)))
        return
    file = tar.extractfile(member)
    assert file is not None
    data = file.read()
    if extension in EXTENSIONS:
        images.append((stem, look(data, member.name, None, member.offset_data, member.size)))
    elif extension == ".txt":
        try:
            captions[stem] = tuple(split_lines(data.decode("utf-8-sig"))) or ("",)
        except UnicodeDecodeError as error:
            captions[stem] = f"{member.name}: {_not_utf8(error)}"
    elif (found := _json_captions(data)) is not None:
        captions.setdefault(stem, found)


def _json_captions(data: bytes) -> tuple[str, ...] | None:
    try:
        values = json.loads(data)
    except ValueError:
        return None
    found = next((values[name] for name in TEXT_COLUMNS if name in values), None) if isinstance(values, dict) else None
    return _as_captions(found)


def _as_captions(value: Any) -> tuple[str, ...] | None:
    values = [value] if isinstance(value, str) else value
    if isinstance(values, list) and values and all(isinstance(item, str) and is_text(item) for item in values):
        return tuple(values)
    return None


def inspect_parquet(store: Store, key: str) -> list[Seen]:
    """Images of a table: a column of bytes, or of structs with `bytes` as Hugging Face writes them."""
    import pyarrow as pa
    from pyarrow import parquet

    with explained(store.url(key)), store.fs.open_input_file(store.path(key)) as file:
        try:
            table = parquet.ParquetFile(file)
            image, text, original = _columns(table.schema_arrow, store.url(key))
            images: list[Seen] = []
            rows = 0
            for batch in table.iter_batches(batch_size=64, columns=[name for name in (image, text, original) if name]):
                nothing = [None] * batch.num_rows
                values, captions, originals = (
                    batch.column(name).to_pylist() if name else nothing for name in (image, text, original)
                )
                for value, caption, before in zip(values, captions, originals, strict=True):
                    seen = _look_at_row(value, _as_captions(caption), rows)
                    if original is not None:
                        images.append(_look_at_row(before, None, rows)._replace(
                            name=f"row {rows} {original}", column=original
                        ))  # fmt: skip
                        seen = seen._replace(original=images[-1].name)
                    images.append(seen)
                    rows += 1
            return images
        except pa.ArrowInvalid as error:
            return [broken(f"not a whole Parquet file ({' '.join(str(error).split())[:200]})")]


def inspect_cifar(data: bytes) -> list[Seen]:
    """Images of a file of CIFAR-10, whose captions name their classes."""
    found, problem = split_records(data)
    if problem:
        return [broken(problem)]
    return [
        look(image, f"record {number}", (caption,), number * RECORD + 1, PIXELS)
        for number, (caption, image) in enumerate(found)
    ]


def _look_at_row(value: Any, captions: tuple[str, ...] | None, row: int) -> Seen:
    data = value.get("bytes") if isinstance(value, dict) else value
    if not data:
        return broken("no bytes in this row", f"row {row}")
    return look(data, f"row {row}", captions, row=row)


def _columns(schema: Any, url: str) -> tuple[str, str | None, str | None]:
    """Of images, of captions, and of what the images are edits of."""
    import pyarrow.types as kinds

    def is_image(kind: Any) -> bool:
        inner = kind.field("bytes").type if kinds.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
        return bool(kinds.is_binary(inner) or kinds.is_large_binary(inner))

    if len(set(schema.names)) < len(schema.names):
        raise UserError(f"{url}: two columns of one name among {', '.join(schema.names)}")
    images = [field.name for field in schema if is_image(field.type)]
    if not images:
        raise UserError(f"{url}: no column of images (bytes, or structs with bytes), only {', '.join(schema.names)}")
    own = [name for name in images if name not in ORIGINAL_COLUMNS] or images
    image = next((name for name in IMAGE_COLUMNS if name in own), own[0])
    text = next((name for name in TEXT_COLUMNS if name in schema.names and name != image), None)
    return image, text, next((name for name in ORIGINAL_COLUMNS if name in images and name != image), None)


def fetch(place: Place) -> bytes:
    """The bytes of one image.

    Raises:
        FileNotFoundError: its file is gone.
        UserError: the store cannot be reached.
    """
    store = Store(place.root)
    if place.row >= 0:
        return _read_row(place.root, place.key, place.row, place.column)
    if place.length >= 0:
        data = store.read_range(place.key, place.offset, place.length)
        return to_ppm(data) if place.key.endswith(".bin") else data
    return store.read(place.key)


def _read_row(root: str, key: str, row: int, column: str) -> bytes:
    starts = _row_groups(root, key)
    group = next(i for i in range(len(starts) - 1) if starts[i] <= row < starts[i + 1])
    value = _row_group(root, key, group, column)[row - starts[group]].as_py()
    return bytes(value["bytes"] if isinstance(value, dict) else value)


@lru_cache(maxsize=64)
def _row_groups(root: str, key: str) -> tuple[int, ...]:
    from pyarrow import parquet

    store = Store(root)
    with explained(store.url(key)), store.fs.open_input_file(store.path(key)) as file:
        metadata = parquet.read_metadata(file)
    starts = [0]
    for i in range(metadata.num_row_groups):
        starts.append(starts[-1] + metadata.row_group(i).num_rows)
    return tuple(starts)


@lru_cache(maxsize=2)
def _row_group(root: str, key: str, group: int, column: str) -> Any:
    """A column of one row group, "" for that of images; images of a table are asked for in order."""
    from pyarrow import parquet

    store = Store(root)
    with explained(store.url(key)), store.fs.open_input_file(store.path(key)) as file:
        table = parquet.ParquetFile(file)
        column = column or _columns(table.schema_arrow, store.url(key))[0]
        return table.read_row_group(group, columns=[column]).column(0)
