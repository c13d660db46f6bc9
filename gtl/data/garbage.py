"""Removing from the cache what no dataset needs."""

from __future__ import annotations

import time

from gtl.data.cache import prompt_key, sweep
from gtl.data.dataset import FOLDER, read, used_prompts
from gtl.storage import Store

MADE_AGAIN = ("samples", "features")
"""Folders of what `gtl evaluate` draws and computes again where it is missing."""


def collect_garbage(cache: Store, keep_days: float = 30, grace_days: float = 1) -> tuple[int, int]:
    """Forget what was not used for a while, and remove the shards that no dataset needs.

    Args:
        cache: Its root.
        keep_days: A dataset that a run has prepared within so many days stays; so do samples and features of pictures
            that were made then.
        grace_days: A shard written within so many days stays: the fill that wrote it may still be running.

    Returns:
        Shards and files removed, and their bytes.
    """
    now = time.time()
    used = {key.removesuffix(".used"): mtime / 1e9 for key, _, mtime in cache.list(FOLDER) if key.endswith(".used")}
    keys: set[str] = set()
    for key, _, mtime in list(cache.list(FOLDER)):
        name, _, kind = key.rpartition(".")
        if kind != "parquet":
            continue
        if max(used.get(name, 0), mtime / 1e9) < now - keep_days * 86400:
            cache.delete(key)
            cache.delete(f"{name}.used")
            continue
        fingerprint = name.rpartition("/")[2]
        dataset = read(cache, fingerprint)
        for entry in dataset.entries:
            keys.update(f"{dataset.images.name}/{variant}" for variant in (*entry.variants, *entry.originals))
        if dataset.prompts is not None:
            captions = {caption for entry in dataset.entries for caption in entry.record.captions}
            texts = {"", *captions, *used_prompts(cache, fingerprint)}
            keys.update(f"{dataset.prompts.name}/{prompt_key(text)}" for text in texts)
    removed, freed = sweep(cache, keys.__contains__, now - grace_days * 86400)
    for folder in MADE_AGAIN:
        for key, size, mtime in list(cache.list(folder)):
            if mtime / 1e9 < now - keep_days * 86400:
                cache.delete(key)
                removed, freed = removed + 1, freed + size
    return removed, freed
