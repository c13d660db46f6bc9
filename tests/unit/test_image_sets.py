"""Published sets of images in the formats of their own: CIFAR-10's binary version, CelebA with its attributes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gtl.data.captions import CaptionRule
from gtl.data.cifar import CLASSES, RECORD
from gtl.data.containers import fetch, inspect
from gtl.data.sources import Located, Scan, scan
from gtl.images import decode
from gtl.types import UserError

NAMES = "5_o_Clock_Shadow Black_Hair Male Smiling Young"


def scanned(source: Path, rule: CaptionRule | None = None) -> Scan:
    def look(root: str, files: list) -> list:
        return [inspect(root, *file) for file in files]

    return scan(str(source), rule or CaptionRule(), 1.0, None, look)


def write_cifar(file: Path, labels: list[int], seed: int = 0) -> np.ndarray:
    """Pictures [N, 32, 32, 3], written as planes behind their labels."""
    rng = np.random.default_rng(seed)
    pictures = rng.integers(0, 256, (len(labels), 32, 32, 3), dtype=np.uint8)
    records = [
        bytes([label]) + picture.transpose(2, 0, 1).tobytes() for label, picture in zip(labels, pictures, strict=True)
    ]
    file.write_bytes(b"".join(records))
    return pictures


def pixels_of(image: Located) -> np.ndarray:
    data = fetch(image.place)
    assert hashlib.sha256(data).hexdigest() == image.record.sha256
    return np.asarray(decode(data))


def test_cifar_is_read_as_it_is_published(tmp_path: Path) -> None:
    first = write_cifar(tmp_path / "data_batch_1.bin", [6, 0, 9])
    second = write_cifar(tmp_path / "data_batch_2.bin", [1], seed=1)
    write_cifar(tmp_path / "test_batch.bin", [5], seed=2)
    (tmp_path / "batches.meta.txt").write_text("\n".join(CLASSES))
    (tmp_path / "pytorch_model.bin").write_bytes(b"no pictures")
    found = scanned(tmp_path)
    assert found.broken == []
    assert [image.record.captions for image in found.images] == [
        ("a photo of a frog",), ("a photo of an airplane",), ("a photo of a truck",), ("a photo of an automobile",)
    ]  # fmt: skip
    assert {image.record.size for image in found.images} == {(32, 32)}
    for image, picture in zip(found.images, [*first, *second], strict=True):
        np.testing.assert_array_equal(pixels_of(image), picture)
    (tested,) = scanned(tmp_path / "test_batch.bin").images
    assert tested.record.captions == ("a photo of a dog",)
    assert tested.record.uri.endswith("test_batch.bin#record 0")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (bytes(RECORD + 7), f"no whole file of CIFAR-10: 7 bytes after 1 records of {RECORD}"),
        (bytes([10]) + bytes(RECORD - 1), "no CIFAR-10: record 0 has label 10, expected 0 to 9"),
    ],
)
def test_what_is_no_cifar_is_broken(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "data_batch_1.bin").write_bytes(data)
    ((_, reason),) = scanned(tmp_path).broken
    assert reason == said


def test_the_version_of_pickles_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "data_batch_1").write_bytes(b"\x80\x02}")
    with pytest.raises(UserError, match="no images there; looked for .* and CIFAR-10's data_batch_1.bin"):
        scanned(tmp_path)


def write_celeba(folder: Path, lines: list[str], at: str = "img_align_celeba") -> Path:
    pictures = folder / at
    pictures.mkdir(parents=True)
    for number in (1, 2):
        Image.new("RGB", (178, 218), (number * 50, 0, 0)).save(pictures / f"{number:06d}.jpg")
    (folder / "list_attr_celeba.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("at", ["img_align_celeba", "Img/img_align_celeba"])
def test_celeba_is_captioned_by_its_attributes(tmp_path: Path, at: str) -> None:
    lines = ["3", NAMES, "000001.jpg -1  1 -1  1  1", "000002.jpg  1 -1  1 -1 -1", "000003.jpg  1  1  1  1  1"]
    found = scanned(write_celeba(tmp_path, lines, at))
    assert [image.record.captions for image in found.images] == [
        ("a photo of a face, black hair, smiling, young",), ("a photo of a face, 5 o clock shadow, male",)
    ]  # fmt: skip
    assert {image.record.size for image in found.images} == {(218, 178)}


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["000001.jpg 1", NAMES], "list_attr_celeba.txt:1: expected the number of lines"),
        (["1", NAMES, "000001.jpg 1 1 1"], "list_attr_celeba.txt:3: 000001.jpg: expected 1 or -1 for each of 5"),
        (["1", NAMES, "000001.jpg 1 1 1 0 1"], "list_attr_celeba.txt:3: 000001.jpg: expected 1 or -1"),
    ],
)
def test_damaged_attributes_are_refused(tmp_path: Path, lines: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        scanned(write_celeba(tmp_path, lines))
