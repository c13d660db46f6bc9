"""From a folder, a table, shards or a bucket of them to records: images with sizes, hashes and captions."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, NamedTuple

from gtl.data.captions import LABEL_FILES, METADATA_FILES, ORIGINAL, CaptionRule, read_metadata, split_lines
from gtl.data.celeba import ATTRIBUTES, captions_of
from gtl.data.cifar import NAME
from gtl.data.containers import CONTAINERS, Place
from gtl.data.index import Index, Seen, SeenFile
from gtl.data.labels import NOTHING, labels_of, read_labels
from gtl.families.files import cache_home
from gtl.images import EXTENSIONS
from gtl.storage import Store
from gtl.types import Original, Progress, Record, UserError

INDEX_PIECE = 4096
"""Files that are remembered together."""

Inspect = Callable[[str, list["File"]], Iterator[SeenFile]]
"""Reads files of a root (see `gtl.data.containers.inspect`), on the cluster or here."""


class File(NamedTuple):
    """A source file as it is listed."""

    key: str
    size: int
    """Bytes."""
    mtime: int


class Beginning(NamedTuple):
    """The image that another one is an edit of."""

    original: Original
    size: tuple[int, int]
    """(height, width)."""
    place: Place
    error: str
    """Why it can't be used; empty if it can."""


class Located(NamedTuple):
    """A record and where its bytes are."""

    record: Record
    place: Place
    beginning: Beginning | None = None


class Broken(NamedTuple):
    """An image that can't be used, and why."""

    uri: str
    reason: str


@dataclass
class Scan:
    """What a source holds."""

    images: list[Located] = field(default_factory=list)
    """Without captions where the rule gives none."""
    broken: list[Broken] = field(default_factory=list)

    def extend(self, other: Scan) -> None:
        """Add another source's."""
        self.images += other.images
        self.broken += other.broken


@dataclass
class Listing:
    """The files of a source, by what they are."""

    store: Store
    images: dict[str, File] = field(default_factory=dict)
    containers: dict[str, File] = field(default_factory=dict)
    texts: dict[str, File] = field(default_factory=dict)
    metadata: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)


def list_source(source: str) -> Listing:
    """List a folder, recursively, or a single .parquet, .tar or .bin file. Hidden files and folders are left out.

    Raises:
        UserError: there is no such folder, it holds no images, or it cannot be reached.
    """
    if not source:
        raise UserError("data.source: '': expected a folder, a .parquet or .tar file, or a URL")
    store = Store(source)
    extension = posixpath.splitext(source)[1].lower()
    if store.is_local and not os.path.exists(store.root):
        raise UserError(f"data.source: {source}: no such folder or file")
    is_named = extension in CONTAINERS and not (store.is_local and os.path.isdir(store.root))
    if is_named:
        parent, _, name = store.root.rpartition("/")
        store = Store(parent)
        files = [file for file in store.list(recursive=False) if file[0] == name]
    elif store.is_local and not os.path.isdir(store.root):
        raise UserError(f"data.source: {source}: neither a folder nor a .parquet or .tar file")
    else:
        files = list(store.list())
        if store.is_local:
            files = without_loops(store, files)
    listing = Listing(store)
    for file in map(File._make, files):
        _sort_in(listing, file, is_named)
    if not listing.images and not listing.containers:
        raise UserError(
            f"data.source: {source}: no images there; looked for {', '.join(sorted(EXTENSIONS))}, .parquet, .tar and "
            "CIFAR-10's data_batch_1.bin"
        )
    return listing


def without_loops(store: Store, files: list[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """Each file of a local folder once, under its shortest key, where links lead into one of its folders again."""
    places: dict[str, str] = {}
    kept: dict[tuple[str, str], tuple[str, int, int]] = {}
    for file in sorted(files, key=lambda file: (file[0].count("/"), file[0])):
        folder, name = posixpath.split(file[0])
        if folder not in places:
            places[folder] = os.path.realpath(store.url(folder))
        kept.setdefault((places[folder], name), file)
    return sorted(kept.values())


def _sort_in(listing: Listing, file: File, is_named: bool) -> None:
    if any(part.startswith(".") for part in file.key.split("/")):
        return
    extension = posixpath.splitext(file.key)[1].lower()
    if posixpath.basename(file.key) in METADATA_FILES:
        listing.metadata.append(file.key)
    elif posixpath.basename(file.key) in LABEL_FILES:
        listing.labels.append(file.key)
    elif extension in EXTENSIONS:
        listing.images[file.key] = file
    elif extension in CONTAINERS:
        if extension != ".bin" or is_named or NAME.fullmatch(posixpath.basename(file.key)):
            listing.containers[file.key] = file
    elif extension == ".txt":
        listing.texts[file.key] = file


def scan(
    source: str, rule: CaptionRule, weight: float, cache: Store | None, inspect: Inspect,
    progress: Progress | None = None, columns: Collection[str] = (),
) -> Scan:  # fmt: skip
    """Everything a source holds; of a cache, only files that its index does not know in this state are read.

    A built-in set is drawn first, into the cache; without one, into the cache of this machine. Records have labels of
    those of the `columns` that there are.

    Raises:
        UserError: the source, a metadata file or a table is not what it has to be.
    """
    if source.startswith("builtin:"):
        from gtl.data.scenes.sets import SceneSet, draw_set, label_set

        drawn = draw_set(scenes := SceneSet.parse(source), cache or Store(cache_home()), progress)
        if columns:
            label_set(scenes, drawn, progress)
        source = drawn.root
    listing = list_source(source)
    told = collect_metadata(listing) if rule.reads_metadata else Told({}, {})
    metadata, labels = told.captions, read_labels(listing, columns)
    texts = needed_sidecars(listing, metadata) if rule.reads_sidecars else {}
    wanted = [*listing.images.values(), *listing.containers.values(), *texts.values()]
    seen = look_up(listing.store, wanted, None if cache is None else Index(cache, listing.store.url()), inspect)
    result, beginnings = Scan(), set(told.originals.values()) - metadata.keys()
    for key in sorted({*listing.images, *listing.containers} - beginnings):
        sidecar = texts.get(posixpath.splitext(key)[0])
        text = None if sidecar is None else seen[sidecar.key]
        if text is not None and text.text is None:
            result.broken += [Broken(text.url, image.error) for image in text.images]
            continue
        lines = None if text is None else split_lines(text.text or "")
        others = {image.name: image for image in seen[key].images}
        own = labels.get(key, [])
        for image in seen[key].images:
            if image.column:
                continue
            beginning = None
            if (origin := told.originals.get(key)) is not None:
                beginning = _beginning(listing.store, origin, seen[origin].images[0])
            elif image.original:
                beginning = _beginning(listing.store, key, others[image.original])
            _add(result, listing.store, key, image, rule, weight, metadata.get(key), lines, beginning)
            if columns and not image.error:
                row = max(image.row, 0)
                label_last(result, key, own[row] if row < len(own) else NOTHING, columns)
    return result


def _beginning(store: Store, key: str, image: Seen) -> Beginning:
    """Of an image in a file."""
    original = Original(uri_of(store.url(key), image.name), image.sha256)
    place = Place(store.root, key, image.offset, image.length, image.row, image.column)
    return Beginning(original, (image.height, image.width), place, image.error)


def look_up(store: Store, wanted: list[File], index: Index | None, inspect: Inspect) -> dict[str, SeenFile]:
    """What is in the files, by key: from the index, or read and then remembered."""
    known = {} if index is None else index.load()
    found = {file.key: known.get(store.url(file.key)) for file in wanted}
    fresh = {f.key: s for f in wanted if (s := found[f.key]) is not None and (s.size, s.mtime) == (f.size, f.mtime)}
    stale = [file for file in wanted if file.key not in fresh]
    if stale:
        skip = len(store.url()) + 1
        coming = iter(inspect(store.url(), stale))
        # In pieces, so that a scan that is cut off has not been for nothing.
        while new := list(islice(coming, INDEX_PIECE)):
            if index is not None:
                index.add(new)
            fresh.update({file.url[skip:]: file for file in new})
    return fresh


class Told(NamedTuple):
    """What metadata files say, by image key."""

    captions: dict[str, list[str]]
    originals: dict[str, str]
    """The image that one is an edit of."""


def collect_metadata(listing: Listing) -> Told:
    """What every metadata file says; it may lie in any folder, and names are relative to it.

    Raises:
        UserError: a line is wrong, or names an image that is not there.
    """
    captions: dict[str, list[str]] = {}
    originals: dict[str, str] = {}
    for key in listing.metadata:
        url = listing.store.url(key)
        if posixpath.basename(key) == ATTRIBUTES:
            for image, text in captions_of(listing.store.read(key), url, listing.images):
                captions.setdefault(image, []).append(text)
            continue
        for row in read_metadata(listing.store.read(key), url):
            image = posixpath.normpath(posixpath.join(posixpath.dirname(key), row.name))
            if image not in listing.images:
                raise UserError(
                    f"{url}:{row.line}: file_name {row.name!r}: no such image; remove the line or add the file"
                )
            captions.setdefault(image, []).extend(row.captions)
            if row.original is None:
                continue
            origin = posixpath.normpath(posixpath.join(posixpath.dirname(key), row.original))
            if origin not in listing.images:
                raise UserError(f"{url}:{row.line}: {ORIGINAL} {row.original!r}: no such image")
            if originals.setdefault(image, origin) != origin:
                raise UserError(f"{url}:{row.line}: {ORIGINAL} {row.original!r}: {row.name} has another one already")
    return Told(captions, originals)


def needed_sidecars(listing: Listing, captioned: Mapping[str, object]) -> dict[str, File]:
    """Text files beside images that have no caption yet, by the path without its ending."""
    texts = {posixpath.splitext(key)[0]: file for key, file in listing.texts.items()}
    stems = (posixpath.splitext(key)[0] for key in listing.images if key not in captioned)
    return {stem: texts[stem] for stem in stems if stem in texts}


def uri_of(url: str, name: str) -> str:
    """How an image is called in messages and records: its file, and its name in there."""
    return f"{url}#{name}" if name else url


def _add(
    result: Scan, store: Store, key: str, image: Seen, rule: CaptionRule, weight: float,
    metadata: list[str] | None, sidecar: list[str] | None, beginning: Beginning | None,
) -> None:  # fmt: skip
    uri = uri_of(store.url(key), image.name)
    if image.error:
        result.broken.append(Broken(uri, image.error))
        return
    folder = posixpath.basename(posixpath.dirname(f"{store.url()}/{key}"))
    if image.captions is not None:
        metadata = sidecar = list(image.captions)
    file = image.name if image.length >= 0 else key
    captions = rule.choose(file, folder, metadata, sidecar)
    record = Record(uri, image.sha256, (image.height, image.width), captions, weight)
    place = Place(store.root, key, image.offset, image.length, image.row)
    result.images.append(Located(record, place, beginning))


def label_last(result: Scan, key: str, labels: Mapping[str, Any], columns: Collection[str]) -> None:
    """Give the image that was added last its labels."""
    last = result.images[-1]
    folder = posixpath.basename(posixpath.dirname(f"{last.place.root}/{key}"))
    told = labels_of(labels, columns, folder, last.record.captions)
    result.images[-1] = last._replace(record=replace(last.record, labels="" if told == "{}" else told))
