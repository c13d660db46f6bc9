"""From a recipe's data section to a dataset whose tensors are all in the cache."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gtl.config.pairs import Needs
from gtl.config.recipe import Data, Source
from gtl.data.buckets import MAX_ASPECT, Size, bucket_sizes, choose_bucket, variant_key, variants
from gtl.data.cache import prompt_key
from gtl.data.captions import ORIGINAL, CaptionRule
from gtl.data.containers import ORIGINAL_COLUMNS
from gtl.data.dataset import BYTE_SPACE, NO_SPACE, PIXEL_SPACE, Cuts, Dataset, choose_held_out
from gtl.data.fill import ImageWork, fill
from gtl.data.index import Index, SeenFile
from gtl.data.labels import CAPTION, check_labels, check_turned
from gtl.data.sources import Broken, File, Located, Scan, list_source, scan, uri_of
from gtl.families import seeing
from gtl.storage import Store
from gtl.types import Entry, Progress, UserError, quiet

if TYPE_CHECKING:
    from gtl.families.base import Family

ENCODED = Needs(images="latents", text="embeddings")
FILES_PER_CALL = 128
"""Source files that a task looks into at a time."""
NAMED = 20
"""Broken files that are named one by one; the rest is counted."""

logger = logging.getLogger(__name__)


def prepare(
    data: Data, family: Family, cache_url: str, *, dtype: str, needs: Needs = ENCODED,
    prior: tuple[str, str, float] | None = None, target: str | None = None, prompts: Sequence[str] = (),
    held_out: bool = False, check: Callable[[], None] | None = None, progress: Progress | None = None,
) -> Dataset:  # fmt: skip
    """Scan the sources, choose crops, encode what the cache lacks; without new images or captions this reads no file.

    Args:
        data: The recipe's section.
        family: The opened model.
        cache_url: Root of the cache.
        dtype: fp32 or bf16, of the encoders and of what is stored.
        needs: What of an image and of its captions training reads.
        prior: Folder, prompt and loss weight of class images, learned beside the data.
        target: The source whose images are marked as those of the domain to adapt to.
        prompts: Are encoded too, when captions are.
        held_out: Of all images, only those that `data.validation` keeps from training.
        check: Is called before anything is encoded, and may raise.
        progress: Is called as it goes on.

    Raises:
        UserError: a source, a caption or the cache is not what it has to be, or too many images are broken.
    """
    tell: Progress = progress or quiet
    cache = Store(cache_url)
    tasks = seeing(family).tasks if needs.labels else {}
    if reads := bool(tasks and family.encoders):  # what its heads say is of captions alone
        needs = replace(needs, images="none", text="embeddings")
    check_turned(tasks, data.flip)
    found = scan_all(data, cache, prior, tell, target, {task.column for task in tasks.values()}, reads)
    found = paired(found) if needs.originals else unpaired(found)
    if tasks:
        check_labels(found, tasks)
    if needs.text == "none":
        found.images = [located._replace(record=replace(located.record, captions=())) for located in found.images]
    check_usable(found, data)
    check_captioned(found, data, needs)
    if reads:
        check_told_apart(found)
    sizes = bucket_sizes(data.resolution, family.multiple, MAX_ASPECT if data.buckets else 1.0, family.max_size)
    cuts = Cuts(data.crops, data.flip, data.seed)
    images, texts = spaces(family, dtype, needs)
    failed: dict[str, str] = {}
    while True:
        wanted = only_held_out(found.images, data.validation) if held_out else found.images
        entries = [make_entry(located, sizes, cuts) for located in wanted]
        dataset = Dataset(cache, entries, images, texts, cuts)
        dataset.refresh()
        # Once is enough for all copies of an image, unless the one that was to stand for them failed.
        work = [] if needs.images == "none" else list(missing_images(dataset, wanted, every_copy=bool(failed)))
        captions = missing_texts(dataset, prompts)
        if check is not None and (work or captions):
            check()
        failed = fill(family, dataset.images, dataset.prompts, cache, dtype, work, captions,
                      lambda done, total: tell("encode", done, total), data.gpus_per_encoder)  # fmt: skip
        if not failed:
            break
        remember_broken(failed, found, cache)
        found.broken += [Broken(uri, reason) for uri, reason in sorted(failed.items())]
        found.images = [located for located in found.images if not failed.keys() & uris_of(located)]
        check_usable(found, data)
    name_broken(found.broken)
    dataset.refresh()
    dataset.save(prompts)
    return dataset


def spaces(family: Family, dtype: str, needs: Needs) -> tuple[str, str | None]:
    """Names of the cache's spaces of images and of prompts, which say what made the tensors in them."""
    images = {"pixels": PIXEL_SPACE, "latents": BYTE_SPACE, "none": NO_SPACE}[needs.images]
    if needs.images == "latents" and family.codec is not None:
        images = f"images-{family.fingerprint(family.codec)[:16]}-{dtype}"
    if needs.text != "embeddings":
        return images, None
    return images, f"prompts-{family.fingerprint(*family.encoders)[:16]}-{dtype}"


def check_sources(data: Data) -> None:
    """List the sources, which is quick.

    Raises:
        UserError: one is not there, or holds no images.
    """
    for s in sources(data):
        if not s.source.startswith("builtin:"):
            list_source(s.source)


def sources(data: Data) -> list[Source]:
    """What the recipe names."""
    return data.source if isinstance(data.source, list) else [Source(source=data.source)]


def scan_all(
    data: Data, cache: Store, prior: tuple[str, str, float] | None, progress: Progress, target: str | None = None,
    columns: Collection[str] = (), reads: bool = False,
) -> Scan:  # fmt: skip
    """The images of every source with labels of those columns, those of the target marked, and of the prior.

    Beside labels captions count only if they are read, too.

    Raises:
        UserError: a source or a caption is not what it has to be.
    """
    rule = CaptionRule(data.captions, data.caption_template)
    if columns and CAPTION not in columns and not reads:
        rule = CaptionRule("folder")  # metadata files need no captions then

    def look(root: str, files: list[File]) -> Iterator[SeenFile]:
        return inspect_all(root, files, progress)

    found = Scan()
    for s in sources(data):
        part = scan(s.source, rule, s.weight, cache, look, progress, columns)
        if s.source == target:
            part.images = [image._replace(record=replace(image.record, is_target=True)) for image in part.images]
        part.images *= s.repeats
        found.extend(part)
    if prior is not None:
        drawn = scan(prior[0], CaptionRule.fixed(prior[1]), prior[2], cache, look, progress)
        drawn.images = [image._replace(record=replace(image.record, is_class_image=True)) for image in drawn.images]
        found.extend(drawn)
    return found


def inspect_all(root: str, files: list[File], progress: Progress) -> Iterator[SeenFile]:
    """Look into source files on the cluster."""
    from gtl.data.stream import run
    from gtl.session import session

    rows = [[root, *file] for file in files]
    with session():
        for done, line in enumerate(run(rows, inspect_batch, calls=-(-len(rows) // FILES_PER_CALL)), 1):
            progress("scan", done, len(rows))
            yield SeenFile.parse(line)


def inspect_batch(batch: dict[str, Any]) -> dict[str, list[str]]:
    """The task behind `inspect_all`."""
    from gtl.data.containers import inspect
    from gtl.data.stream import each, pack, unpack

    return pack(each(lambda row: inspect(*row).dump(), unpack(batch)))


def make_entry(located: Located, sizes: tuple[Size, ...], cuts: Cuts) -> Entry:
    """The image with its bucket and the cache keys of its crops."""
    record = located.record
    bucket = choose_bucket(record.size, sizes)
    found = variants(record.sha256, record.size, bucket, **vars(cuts))
    keys = tuple(variant_key(record.sha256, bucket, variant) for variant in found)
    if record.original is None:
        return Entry(record, bucket, keys)
    return Entry(record, bucket, keys, tuple(variant_key(record.original.sha256, bucket, variant) for variant in found))


def only_held_out(located: Sequence[Located], share: float) -> list[Located]:
    """The images that `Dataset.split` would hold out of these.

    Raises:
        UserError: nothing would be left to train on.
    """
    chosen = choose_held_out((each.record for each in located), share)
    return [image for image in located if image.record.sha256 in chosen]


def missing_images(dataset: Dataset, located: Sequence[Located], every_copy: bool) -> Iterator[ImageWork]:
    """What has to be encoded; an image that is there twice is encoded once, or as often as it is there."""
    asked: set[str] = set()
    for entry, (record, place, beginning) in zip(dataset.entries, located, strict=True):
        files = [(record.uri, record.sha256, place, entry.variants)]
        if record.original is not None and beginning is not None:
            files.append((record.original.uri, record.original.sha256, beginning.place, entry.originals))
        for uri, sha256, at, keys in files:
            lacking = [key for key in keys if key not in dataset.images and (every_copy or key not in asked)]
            if lacking:
                asked.update(lacking)
                found = variants(record.sha256, record.size, entry.bucket, **vars(dataset.cuts))
                wanted = {key: v for key, v in zip(keys, found, strict=True) if key in lacking}
                yield ImageWork(uri, sha256, at, entry.bucket, wanted)


def missing_texts(dataset: Dataset, prompts: Sequence[str]) -> dict[str, str]:
    """The captions and prompts that have to be encoded by cache key, the empty one among them; sorted."""
    if dataset.prompts is None:
        return {}
    captions = {"", *prompts, *(caption for entry in dataset.entries for caption in entry.record.captions)}
    return {key: caption for caption in sorted(captions) if (key := prompt_key(caption)) not in dataset.prompts}


def unpaired(found: Scan) -> Scan:
    """Images by themselves, whatever they are edits of."""
    return Scan([located._replace(beginning=None) for located in found.images], found.broken)


def paired(found: Scan) -> Scan:
    """Images with those that they are edits of; one whose other cannot be used is broken, too.

    Raises:
        UserError: some are edits of none.
    """
    if lonely := [located.record.uri for located in found.images if located.beginning is None]:
        raise UserError(
            f"data.source: {len(lonely)} of {len(found.images)} images say not which image they are an edit of, the "
            f"first: {lonely[0]}; give {ORIGINAL} beside file_name and text in metadata.jsonl, or a column "
            f"{ORIGINAL_COLUMNS[0]} in a table"
        )
    images, broken = [], list(found.broken)
    for located in found.images:
        record, beginning = located.record, located.beginning
        assert beginning is not None
        reason = beginning.error
        if not reason and beginning.size != record.size:
            (high, wide), (tall, broad) = beginning.size, record.size
            reason = f"{wide}x{high} pixels, and its edit has {broad}x{tall}; both have to be of one size"
        if reason:
            broken.append(Broken(record.uri, f"what it is an edit of, {beginning.original.uri}: {reason}"))
        else:
            images.append(located._replace(record=replace(record, original=beginning.original)))
    return Scan(images, broken)


def uris_of(located: Located) -> set[str]:
    """Of an image, and of the one that it is an edit of."""
    return {located.record.uri, *([located.beginning.original.uri] if located.beginning else [])}


def check_captioned(found: Scan, data: Data, needs: Needs) -> None:
    """Refuse images without a caption where one is needed, or with one that lacks the word that is to be learned.

    Raises:
        UserError: there are some.
    """
    check_word(found, needs.word, needs.everywhere)
    captionless = [located.record.uri for located in found.images if not located.record.captions]
    if captionless and needs.text != "none":
        raise UserError(
            f"data.captions: {data.captions}: {len(captionless)} images have no such caption, the first: "
            f"{captionless[0]}; caption them, or use captions: auto"
        )


def check_told_apart(found: Scan) -> None:
    """Refuse captions that are all the same, of which nothing can be told.

    Raises:
        UserError: they are.
    """
    captions = {caption for located in found.images for caption in located.record.captions}
    if len(captions) == 1:
        raise UserError(
            f"data.captions: all {len(found.images)} images have the caption {captions.pop()!r}, of which the model's "
            "heads can tell nothing; give text in metadata.jsonl, or a .txt beside each image"
        )


def check_word(found: Scan, word: str | None, everywhere: bool = True) -> None:
    """Refuse captions of the subject that lack the word, of which their images could teach nothing; or if all do.

    Raises:
        UserError: there are some.
    """
    if word is None:
        return
    captions = [
        (caption, image.record.uri)
        for image in found.images if not image.record.is_class_image for caption in image.record.captions
    ]  # fmt: skip
    lacking = [(caption, uri) for caption, uri in captions if word not in caption]
    if lacking and (everywhere or len(lacking) == len(captions)):
        caption, uri = lacking[0]
        raise UserError(
            f"tuner.token: {word!r}: {len(lacking)} of {len(captions)} captions do not contain it, the first: "
            f"{caption!r} of {uri}; write it into them, or set data.captions: template and data.caption_template: "
            f"a photo of {word}"
        )


def check_usable(found: Scan, data: Data) -> None:
    """Refuse when too many images are broken, or none is left; class images make up for none.

    Raises:
        UserError: so it is.
    """
    whole, broken = sum(not located.record.is_class_image for located in found.images), len(found.broken)
    total = whole + broken
    if broken and (broken > data.max_broken * total or not whole):
        first = found.broken[0]
        raise UserError(
            f"data.max_broken: {broken} of {total} images can't be read, {data.max_broken:.0%} are allowed; "
            f"the first: {first.uri}: {first.reason}"
        )
    if not whole:
        raise UserError(f"data.source: {data.source}: no image in it")


def remember_broken(failed: dict[str, str], found: Scan, cache: Store) -> None:
    """Put what turned out to be broken only when it was decoded into the index, so that the next run knows."""
    urls: dict[str, set[str]] = {}
    for located in found.images:
        if failed.keys() & uris_of(located):
            for place in (located.place, *([located.beginning.place] if located.beginning else [])):
                urls.setdefault(place.root, set()).add(Store(place.root).url(place.key))
    for root, files in urls.items():
        index = Index(cache, root)
        known = index.load()
        index.add(mark_broken(known[url], failed) for url in sorted(files))


def mark_broken(file: SeenFile, failed: Mapping[str, str]) -> SeenFile:
    """The file with the reasons (by URI) why its images are broken."""
    images = (i._replace(error=failed.get(uri_of(file.url, i.name), i.error)) for i in file.images)
    return replace(file, images=tuple(images))


def name_broken(broken: Sequence[Broken]) -> None:
    """Tell the user which images are left out."""
    for uri, reason in broken[:NAMED]:
        logger.warning("%s: %s; left out", uri, reason)
    if len(broken) > NAMED:
        logger.warning("and %d more images left out", len(broken) - NAMED)
