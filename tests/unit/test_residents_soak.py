"""Adapters that come and go for long leave nothing behind: not in memory, on the device, or on the disk."""

import ctypes
import gc
import itertools
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch

from gtl.adapters import Card, Registry, disk
from gtl.adapters.card import base_of
from gtl.adapters.delta import write_delta
from gtl.adapters.formats import LoraExport, write_lora
from gtl.adapters.residents import Adapters, Residents
from gtl.families import open_family
from gtl.generate.images import load_parts
from tests.endpoint import BASE
from tests.loras import random_lora

MIB = 2**20
LOOKS = 20
GROWTH = 24 * MIB
"""Bytes that the process may gain after the first half: allocators do not give back all that they are given."""
ROOM = 400_000
"""Bytes on the disk: of two of the four adapters or so."""


@pytest.fixture
def registry(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A bucket with two LoRAs, one of the text encoder too, and a delta, and a machine with room for two of them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    family, registry = open_family(BASE), Registry(f"{s3}/{tmp_path.name}", disk_bytes=ROOM)
    unet, encoder = family.load("unet"), family.load("text_encoder")
    lora = LoraExport(rank=4, alpha=4.0)
    write_lora(random_lora(unet, "unet", seed=1, only="attn"), tmp_path / "a", config=lora)
    write_lora(random_lora(unet, "unet", seed=2, only="conv1"), tmp_path / "b", config=lora)
    both = random_lora(unet, "unet", seed=3, only="attn2") | random_lora(encoder, "text_encoder", seed=4)
    write_lora(both, tmp_path / "words", config=lora)
    write_delta({f"unet.{n}": p * 1.1 for n, p in unet.named_parameters() if "up_blocks.0" in n}, tmp_path / "delta")
    for name in ("a", "b", "words", "delta"):
        card = Card(name=name, version="v1", base=base_of(family, BASE), tuner={"type": "lora"})
        registry.publish(name, "v1", tmp_path / name, card)
    return registry


def asked(registry: Registry, place: Path) -> Iterator[Adapters]:
    """One after the other for ever, from the folders they were published from; every seventh from the bucket."""
    wanted = [[("a", 1.0)], [("b", 0.5)], [("words", 1.0)], [("a", 0.5), ("b", 0.5)], [("delta", 1.0)]]
    for number, names in enumerate(itertools.cycle(wanted)):
        with ExitStack() as read:
            fetched = {name: registry.fetch(name, read) for name, _ in names} if number % 7 == 0 else {}
            yield tuple((fetched.get(name, place / name), scale) for name, scale in names)


@pytest.mark.parametrize("cycles", [500, pytest.param(10_000, marks=pytest.mark.soak)])
def test_loads_and_evictions_leave_nothing(registry: Registry, tmp_path: Path, cycles: int) -> None:
    family = open_family(BASE)
    parts = load_parts(family, [], device="cpu", dtype=torch.float32)
    targets = {"unet": family.lora_targets(parts["unet"], "all-linear+conv")}
    targets |= {part: family.encoder_targets(parts[part], "all-linear") for part in family.encoders}
    residents = Residents(parts, targets, 2, 8, host_bytes=1)  # one slot, and one in host memory: none is there again
    before = {name: value.clone() for name, value in parts["unet"].state_dict().items() if "lora" not in name}
    tensors, bytes_ = [], []
    for cycle, adapters in zip(range(1, cycles + 1), asked(registry, tmp_path), strict=False):
        loaded = residents.read(adapters)
        seat = residents.seat(adapters, loaded)
        assert seat is not None and not seat.was_there
        residents.wear([seat], "unet")
        residents.leave(seat)
        del loaded, seat
        if cycle % (cycles // LOOKS) == 0:
            gc.collect()
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            tensors.append(sum(isinstance(one, torch.Tensor) for one in gc.get_objects()))
            bytes_.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    later = bytes_[LOOKS // 2 :]
    assert np.polyfit(range(len(later)), later, 1)[0] * len(later) < GROWTH, bytes_
    assert len(set(tensors[1:])) == 1, tensors
    after = parts["unet"].state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items() if name in after)
    disk.trim(ROOM)
    assert sum(disk.size_of(folder) for folder in disk.home().glob("*/*/v1")) <= ROOM
