"""CIFAR-10 in its binary version (Krizhevsky 2009), as cs.toronto.edu/~kriz/cifar.html publishes it.

A file has records of 3,073 bytes: a label, then 32x32 red, green and blue values row by row. The version for Python is
of pickles, which can run code when they are read, and is not read.
"""

from __future__ import annotations

import re

SIDE = 32
HEADER = f"P6 {SIDE} {SIDE} 255\n".encode()
"""In front of a picture, which makes it a PPM file."""
PIXELS = 3 * SIDE * SIDE
RECORD = 1 + PIXELS
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""By their labels."""
NAME = re.compile(r"data_batch_\d+\.bin")
"""Of files that are read where a folder is. The test set, test_batch.bin, has to be named itself."""


def split_records(data: bytes) -> tuple[list[tuple[str, bytes]], str]:
    """Caption and PPM file of every picture of a file, and what is wrong with it, nothing if all is well."""
    found: list[tuple[str, bytes]] = []
    for start in range(0, len(data) - RECORD + 1, RECORD):
        label = data[start]
        if label >= len(CLASSES):
            return [], f"no CIFAR-10: record {len(found)} has label {label}, expected 0 to {len(CLASSES) - 1}"
        found.append((caption_of(label), to_ppm(data[start + 1 : start + RECORD])))
    left = len(data) % RECORD
    problem = f"no whole file of CIFAR-10: {left} bytes after {len(found)} records of {RECORD}" if left else ""
    return ([] if problem else found), problem


def caption_of(label: int) -> str:
    """What a picture of a class shows."""
    name = CLASSES[label]
    return f"a photo of {'an' if name.startswith('a') else 'a'} {name}"


def to_ppm(planes: bytes) -> bytes:
    """A picture's red, green and blue values as a PPM file, which other libraries and `gtl.images.decode` read."""
    pixels = bytearray(PIXELS)
    for channel in range(3):
        pixels[channel::3] = planes[channel * SIDE**2 : (channel + 1) * SIDE**2]
    return HEADER + bytes(pixels)
