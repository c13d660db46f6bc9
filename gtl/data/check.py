"""A look at training images before training on them: `gtl data check FOLDER`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from gtl.data.buckets import Size, bucket_sizes, choose_bucket
from gtl.data.captions import CaptionRule
from gtl.data.containers import fetch, inspect
from gtl.data.index import SeenFile
from gtl.data.sources import Broken, File, Located, scan
from gtl.images import BrokenImage, decode
from gtl.types import Progress, quiet

THREADS = 8
CAPTIONS_SHOWN = 5
LINES_SHOWN = 20
NEAR_BITS = 3
"""Difference hashes that differ in at most this many of 64 bits may be of the same picture."""
NEAR_MEAN = 8.0
"""Mean difference of 8x8 thumbnails, of 255, up to which such pictures are called near duplicates."""


class Thumbnail(NamedTuple):
    """A picture in few numbers."""

    hash: int
    """64-bit difference hash: whether brightness rises between neighbours of a 9x8 grey reduction."""
    pixels: bytes
    """8x8 RGB."""


@dataclass(frozen=True)
class Report:
    """What `check` found. Images are named by URI."""

    source: str
    num_images: int
    captions: dict[str, int]
    """Distinct captions and how many images have them, the most frequent first."""
    captionless: tuple[str, ...]
    """Images that have no caption of their own: training would use their folder's name."""
    buckets: dict[Size, int]
    """Images by (height, width) of their training crop."""
    too_small: tuple[str, ...]
    """Images smaller than their crop: they would be enlarged."""
    broken: tuple[Broken, ...]
    duplicates: tuple[tuple[str, ...], ...]
    """Groups with the same bytes."""
    near_duplicates: tuple[tuple[str, ...], ...]
    """Groups that look alike."""


def check(folder: str, resolution: int = 512, multiple: int = 64, progress: Progress = quiet) -> Report:
    """Read every image of a source, here and now, and report.

    Args:
        folder: A folder, .parquet or .tar file, or a bucket URL of one.
        resolution: Side of the square crop in pixels.
        multiple: Sides of crops are multiples of this.
        progress: Is called as it goes on.

    Raises:
        UserError: the source or a metadata file is not what it has to be.
    """
    sizes = bucket_sizes(resolution, multiple)
    found = scan(folder, CaptionRule("own"), 1.0, None, inspect_here)
    thumbnails: dict[str, Thumbnail] = {}
    good: list[Located] = []
    with ThreadPoolExecutor(THREADS) as pool:
        for done, (located, result) in enumerate(zip(found.images, pool.map(thumbnail, found.images), strict=True), 1):
            progress("look", done, len(found.images))
            if isinstance(result, Thumbnail):
                thumbnails[located.record.uri] = result
                good.append(located)
            else:
                found.broken.append(Broken(located.record.uri, result))
    records = [located.record for located in good]
    buckets = {record.uri: choose_bucket(record.size, sizes) for record in records}
    captions = Counter(caption for record in records for caption in record.captions)
    exact = same([(record.sha256, record.uri) for record in records])
    copies = {uri for group in exact for uri in group[1:]}
    return Report(
        source=folder,
        num_images=len(records),
        captions=dict(captions.most_common()),
        captionless=tuple(record.uri for record in records if not record.captions),
        buckets=dict(sorted(Counter(buckets.values()).items())),
        too_small=tuple(
            r.uri for r in records if r.size[0] < buckets[r.uri][0] or r.size[1] < buckets[r.uri][1]
        ),
        broken=tuple(sorted(found.broken)),
        duplicates=exact,
        near_duplicates=alike({uri: t for uri, t in thumbnails.items() if uri not in copies}),
    )  # fmt: skip


def inspect_here(root: str, files: list[File]) -> Iterator[SeenFile]:
    """Look into source files in this process."""
    with ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(lambda file: inspect(root, *file), files)


def thumbnail(located: Located) -> Thumbnail | str:
    """The decoded image's thumbnail, or why it cannot be decoded."""
    try:
        image = decode(fetch(located.place))
    except BrokenImage as error:
        return str(error)
    grey = image.convert("L").resize((9, 8)).tobytes()
    bits = "".join(str(int(grey[9 * y + x] < grey[9 * y + x + 1])) for y in range(8) for x in range(8))
    return Thumbnail(int(bits, 2), image.resize((8, 8)).tobytes())


def same(pairs: Sequence[tuple[str, str]]) -> tuple[tuple[str, ...], ...]:
    """Names that share a key, in groups of two and more."""
    groups: dict[str, list[str]] = {}
    for key, name in pairs:
        groups.setdefault(key, []).append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def alike(thumbnails: dict[str, Thumbnail]) -> tuple[tuple[str, ...], ...]:
    """Groups of names whose pictures look alike, directly or through others of the group.

    Hashes that differ in at most three bits agree in at least one of their four 16-bit words, so only those that share
    a word are compared.
    """
    leader = {name: name for name in thumbnails}

    def find(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    words: dict[tuple[int, int], list[str]] = {}
    for name, (bits, _) in thumbnails.items():
        for i in range(4):
            words.setdefault((i, bits >> 16 * i & 0xFFFF), []).append(name)
    for names in words.values():
        for position, name in enumerate(names):
            for other in names[:position]:
                if find(other) != find(name) and is_near(thumbnails[other], thumbnails[name]):
                    leader[find(name)] = find(other)
    return same([(find(name), name) for name in thumbnails])


def is_near(a: Thumbnail, b: Thumbnail) -> bool:
    """Whether two pictures look alike. The hash alone takes all plain ones for the same."""
    if (a.hash ^ b.hash).bit_count() > NEAR_BITS:
        return False
    return sum(abs(x - y) for x, y in zip(a.pixels, b.pixels, strict=True)) / len(a.pixels) <= NEAR_MEAN


def render(report: Report) -> str:
    """The report as text for a terminal."""
    lines = [f"{report.source}: {report.num_images} images"]
    lines += ["", f"captions: {len(report.captions)} distinct"]
    lines += [f"  {count:>5} x {caption}" for caption, count in list(report.captions.items())[:CAPTIONS_SHOWN]]
    lines += _section("without a caption (training uses the folder's name)", report.captionless)
    lines += ["", "buckets (width x height)"]
    lines += [f"  {width:>5} x {height:<5} {count}" for (height, width), count in report.buckets.items()]
    lines += _section("smaller than their crop (they are enlarged)", report.too_small)
    lines += _section("broken (they are left out)", [f"{uri}: {reason}" for uri, reason in report.broken])
    lines += _section("exact duplicates", [" = ".join(group) for group in report.duplicates])
    lines += _section("near duplicates", [" ~ ".join(group) for group in report.near_duplicates])
    return "\n".join(lines)


def _section(title: str, rows: Sequence[str]) -> list[str]:
    if not rows:
        return ["", f"{title}: none"]
    more = [f"  and {len(rows) - LINES_SHOWN} more"] if len(rows) > LINES_SHOWN else []
    return ["", f"{title}: {len(rows)}", *(f"  {row}" for row in rows[:LINES_SHOWN]), *more]
