"""Pictures by several processes are those of one, also when a process is killed or a machine lost."""

from __future__ import annotations

import os
import signal
from contextlib import closing
from pathlib import Path

import pytest

from gtl.adapters import Card, Registry
from gtl.adapters.card import base_of
from gtl.adapters.formats import LoraExport, write_lora
from gtl.families import open_family
from gtl.generate.command import run
from gtl.generate.engine import Request
from gtl.generate.spread import Model, Order, Origin, Published, spread
from gtl.types import UserError
from tests.loras import load_unet, random_lora
from tests.tiny import make_sd

REQUEST = Request("a photo of a dog", 64, 64, steps=2)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and a registry with a LoRA of it."""
    folder = tmp_path_factory.mktemp("spread")
    make_sd(folder / "model")
    write_lora(random_lora(load_unet(folder / "model"), "unet"), folder / "lora", config=LoraExport(rank=4, alpha=4))
    base = base_of(open_family(str(folder / "model")), str(folder / "model"))
    card = Card(name="dog", version="v1", base=base, tuner={"type": "lora"})
    Registry(folder / "registry").publish("dog", "v1", folder / "lora", card)
    return folder


def make_order(place: Path, *adapters: str) -> Order:
    source = str(place / "model")
    published = tuple(Published(str(place / "registry"), name) for name in adapters)
    return Order(Model(Origin(source), open_family(source).fingerprint(), published), REQUEST)


def painters() -> list[int]:
    """Process ids of the cluster's actors that draw."""
    from ray._private.state import actors

    known = actors().values()
    return [actor["Pid"] for actor in known if actor["ActorClassName"] == "Painter" and actor["State"] == "ALIVE"]


def test_two_workers_draw_the_files_of_one_process_though_one_is_killed(ray_cluster: None, place: Path) -> None:
    states: list[str] = []

    def watch(phase: str, done: int, total: int, detail: str = "") -> None:
        states.append(detail)
        if states[-2:] == ["2 of 2 workers"] * 2 and "killed" not in states:  # and both have a batch
            os.kill(painters()[0], signal.SIGKILL)
            states.append("killed")

    options = {"prompt": "a photo of a dog", "adapters": ["dog:0.5"], "registry": str(place / "registry"),
               "seed": 3, "steps": 2, "count": 8}  # fmt: skip
    alone = run(out=place / "alone", **options)
    together = run(out=place / "together", **options, workers=2, progress=watch)
    assert "1 of 2 workers" in states[states.index("killed") :]
    assert [path.name for path in together] == [*(f"{i:04d}.png" for i in range(8)), "grid.png"]
    # In batches of four here and there, so that sums are rounded in the same order.
    assert [path.read_bytes() for path in together] == [path.read_bytes() for path in alone]
    assert painters() == []


def test_a_mistake_on_a_worker_is_one_line(ray_cluster: None, place: Path) -> None:
    orders = [make_order(place, "cat@v1")]
    with pytest.raises(UserError) as error, closing(spread(orders)) as pictures:
        next(pictures)
    message = f"adapter 'cat': not in the registry {place / 'registry'}; adapters there: dog (a worker on "
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    assert painters() == []


def test_more_workers_than_there_is_room_for_are_refused(ray_cluster: None, place: Path) -> None:
    with pytest.raises(UserError, match=r"^--workers: 5: each takes one CPU; the cluster has 4$"):
        next(spread([make_order(place)] * 9, workers=5))
