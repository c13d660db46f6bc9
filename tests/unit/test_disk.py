"""Adapters of a bucket on this machine's disk: a bound, and nothing goes while somebody reads it."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from gtl.adapters import Registry, disk
from tests.unit.test_registry import make_card, make_files

SIZE = 10_000


@pytest.fixture
def url(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket with v0 to v5 of one adapter, each a little over 20 kB with its card."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    url = f"{s3}/{tmp_path.name}"
    for n in range(6):
        Registry(url).publish("animals", f"v{n}", make_files(tmp_path / str(n), bytes([n]) * SIZE), make_card())
    return url


def kept() -> list[str]:
    return sorted(folder.name for folder in disk.home().glob("*/animals/v*"))


def room_for(versions: int) -> int:
    return int((versions + 0.5) * (2 * SIZE + 1500))


def fetch(registry: Registry, *numbers: int) -> None:
    """With times of use that differ."""
    for n in numbers:
        registry.fetch(f"animals@v{n}")


def test_the_longest_unused_go(url: str) -> None:
    fetch(Registry(url), 0, 1, 2, 3)
    assert kept() == ["v0", "v1", "v2", "v3"], "where there is no bound all stay"
    bounded = Registry(url, disk_bytes=room_for(3))
    fetch(bounded, 0, 4)
    assert kept() == ["v0", "v3", "v4"], "v0 was used again"
    fetch(bounded, 0, 5)
    assert kept() == ["v0", "v4", "v5"]
    fetch(bounded, 1)
    folder = bounded.fetch("animals@v1")
    assert (folder / "adapter_model.safetensors").read_bytes() == b"\x01" * SIZE, "what went comes back"


def test_what_is_in_use_stays(url: str) -> None:
    registry = Registry(url, disk_bytes=room_for(1))
    with ExitStack() as held, ExitStack() as other:
        first = registry.fetch("animals@v0", held)
        assert registry.fetch("animals@v0", other) == first, "two may use it at once"
        fetch(registry, 1, 2)
        assert kept() == ["v0"], "each of the others goes as soon as it has come: nobody uses it, and v0 takes the room"
        other.close()
        disk.trim(0)
        assert kept() == ["v0"], "the first one still uses it"
    disk.trim(0)
    assert kept() == []


def test_a_fetch_that_is_forgotten_holds_nothing(url: str) -> None:
    Registry(url).fetch("animals@v0", ExitStack())
    disk.trim(0)
    assert kept() == []


def test_many_at_once_read_what_they_asked_for(url: str) -> None:
    """Eight threads, room for two of six versions: everyone reads whole files, and in the end the bound holds."""
    together = threading.Barrier(8)

    def use(seed: int) -> int:
        registry, chance = Registry(url, disk_bytes=room_for(2)), random.Random(seed)
        together.wait()
        for _ in range(12):
            n = chance.randrange(6)
            with ExitStack() as held:
                folder = registry.fetch(f"animals@v{n}", held)
                for _ in range(3):
                    assert (folder / "adapter_model.safetensors").read_bytes() == bytes([n]) * SIZE
        return seed

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(use, range(8))) == list(range(8))
    disk.trim(room_for(2))
    assert 1 <= len(kept()) <= 2
