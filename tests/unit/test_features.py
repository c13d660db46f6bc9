"""The cache of features: by a backbone's weights and pictures' bytes, filled by any number at once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch
from PIL import Image
from torch import Tensor

from gtl.backbones import features as module
from gtl.backbones.features import features_of
from gtl.storage import Store
from gtl.types import UserError

HASHES = [hashlib.sha256(bytes([i])).hexdigest() for i in range(10)]


class Counter:
    """A backbone whose features say which picture it was; it counts what it is asked for."""

    name, resize, dimensions = "counter", "none", 2

    def __init__(self, key: str = "a", classes: int = 0, barrier: Barrier | None = None) -> None:
        self.key, self.classes, self.barrier = key, classes, barrier
        self.seen: list[int] = []

    def fingerprint(self) -> str:
        return hashlib.sha256(self.key.encode()).hexdigest()

    def to(self, device: str) -> Counter:
        return self

    def __call__(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor | None]:
        if self.barrier:
            self.barrier.wait(30)
        widths = [image.width for image in images]
        self.seen += widths
        column = torch.tensor(widths, dtype=torch.float32)[:, None]
        return torch.cat([column, -column], 1), column.repeat(1, self.classes) / 2 if self.classes else None


def picture(hashes: Sequence[str]) -> list[Image.Image]:
    return [Image.new("RGB", (HASHES.index(digest) + 1, 1)) for digest in hashes]


def ask(backbone: Counter, hashes: Sequence[str], cache: Store) -> tuple[Tensor, Tensor | None]:
    return features_of(backbone, hashes, lambda i: picture(hashes)[i], cache)


def files(cache: Store) -> list[str]:
    return [key for key, _, _ in cache.list("features")]


@pytest.mark.parametrize("classes", [0, 3])
def test_only_what_is_missing_is_computed(tmp_path: Path, classes: int) -> None:
    cache = Store(tmp_path)
    first, again, other = Counter(classes=classes), Counter(classes=classes), Counter("b", classes)
    ask(first, HASHES[:4], cache)
    order = [HASHES[i] for i in (5, 2, 0, 5, 4)]
    features, logits = ask(again, order, cache)
    assert first.seen == [1, 2, 3, 4]
    assert again.seen == [6, 5]
    assert features.tolist() == [[6, -6], [3, -3], [1, -1], [6, -6], [5, -5]]
    assert (None if logits is None else logits[:, 0].tolist()) == ([3, 1.5, 0.5, 3, 2.5] if classes else None)
    ask(other, HASHES[:1], cache)
    assert other.seen == [1]  # of other weights nothing is known
    assert len(files(cache)) == 3
    ask(again, order, cache)
    assert len(again.seen) == 2


def test_an_interruption_loses_one_file_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 4)
    cache, backbone = Store(tmp_path), Counter()

    def read(i: int) -> Image.Image:
        if i == 9:
            raise KeyboardInterrupt
        return picture(HASHES)[i]

    with pytest.raises(KeyboardInterrupt):
        features_of(backbone, HASHES, read, cache)
    assert ask(backbone, HASHES, cache)[0][:, 0].tolist() == list(range(1, 11))
    assert backbone.seen == [*range(1, 9), 9, 10]


def test_two_may_fill_it_at_once(tmp_path: Path) -> None:
    cache, barrier = Store(tmp_path), Barrier(2)  # neither writes before both have found it empty
    backbones = [Counter(barrier=barrier), Counter(barrier=barrier)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda backbone: ask(backbone, HASHES, cache)[0], backbones))
    assert torch.equal(*found)
    assert [len(backbone.seen) for backbone in backbones] == [10, 10]
    assert len(files(cache)) == 2
    third = Counter()
    assert torch.equal(ask(third, HASHES, cache)[0], found[0])
    assert third.seen == []


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    cache = Store(tmp_path)
    ask(Counter(), HASHES, cache)
    (file,) = (tmp_path / key for key in files(cache))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=f"{file}: damaged .*; remove it"):
        ask(Counter(), HASHES, cache)


def test_no_pictures_are_a_mistake_of_the_caller(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to look at"):
        ask(Counter(), [], Store(tmp_path))
