"""A GAN from `gtl train` to pictures: two workers, a stop, grids and scores at looks, an adapter, `gtl evaluate`."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from gtl.adapters import Registry
from gtl.builtin import make_gan as make_gan_builtin
from gtl.config import Recipe, parse_recipe
from gtl.evaluate.run import evaluate
from gtl.families import open_family
from gtl.families.source import builtin_folder
from gtl.generate.command import run as generate
from gtl.images import decode, read_recipe
from gtl.report.run import read_run
from gtl.storage import Store
from tests.tiny import make_gan, write_pictures

pytestmark = pytest.mark.usefixtures("ray_cluster")
STEPS = 8


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adversarial")
    make_gan(folder / "model")
    write_pictures(folder / "images", [(40, 32)] * 12)
    return folder


def make_recipe(place: Path, **train: Any) -> Recipe:
    return parse_recipe({
        "model": {"source": str(place / "model")},
        "tuner": {"type": "full"},
        "objective": {"type": "adversarial", "r1": 0.5, "collapse": 0.9, "augmentation": {"probability": "adaptive"}},
        "data": {"source": str(place / "images"), "resolution": 32, "buckets": False},
        "train": {
            "steps": STEPS, "batch_size": 6, "micro_batch": 3, "learning_rate": 1e-3, "workers": 2, "ema": 0.5,
            "checkpoints": {"every": 4}, **train,
        },
        "evaluate": {"every": 4, "metrics": ["kid", "diversity"], "samples": 6, "beside": {"metrics": ["kid"],
                     "samples": 4}},
        "storage": {name: str(place / name) for name in ("runs", "cache", "registry")},
    })  # fmt: skip


def rows_of(place: Path, name: str) -> list[dict[str, float]]:
    (file,) = (place / "runs" / name).glob("*/metrics.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_gan_is_trained_stopped_resumed_drawn_and_measured(place: Path) -> None:
    from gtl.train.launch import train

    train(make_recipe(place), "straight", progress=lambda *row: None)
    told: list[tuple[Any, ...]] = []

    def stop(phase: str, done: int, total: int, detail: str = "") -> None:
        told.append((phase, done, total, detail))
        if phase == "train" and not any(phase == "stopped" for phase, *_ in told):
            told.append(("stopped", done, total, ""))
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(make_recipe(place, steps=400, checkpoints={"every": 1000}), "cut", progress=stop)
    assert any("discriminator loss" in detail and "generator loss" in detail for *_, detail in told)
    (file,) = (place / "runs" / "cut").glob("*/checkpoints/*/manifest.json")
    manifest = json.loads(file.read_text())
    assert manifest["players"].keys() == {"discriminator", "generator"} and 0 < manifest["step"] < 400

    rows = rows_of(place, "straight")
    steps = [row for row in rows if "generator_loss" in row]
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    assert all(0 < row["variety"] for row in steps)
    assert {"discriminator_loss", "discriminator_r1", "discriminator_augmentation"} <= steps[0].keys()

    (run,) = (place / "runs" / "straight").iterdir()
    assert [step for step, _ in read_run(Store(run)).series("kid")][-2:] == [
        4,
        8,
    ]  # in turn or beside, as there is room
    grids = sorted(path.name for path in (run / "samples").iterdir())
    assert grids == ["00000000.png", "00000004.png", "00000008.png"]
    assert read_recipe(run / "samples" / grids[0])["prompts"] == []
    assert (run / "samples" / grids[0]).read_bytes() != (run / "samples" / grids[-1]).read_bytes()
    assert "--prompt" not in (run / "report.html").read_text()

    card = Registry(place / "registry").show("straight")
    assert (card.kind, card.objective["type"], card.base.family) == ("delta", "adversarial", "gan")
    files = generate(out=place / "out", adapters=["straight"], registry=str(place / "registry"), count=2, seed=3)
    base = generate(out=place / "base", model=str(place / "model"), seed=3)
    assert decode(files[0]).size == (32, 32) and files[0].read_bytes() != base[0].read_bytes()

    (found,) = evaluate(make_recipe(place), ["straight"])
    assert found.scores.keys() == {"kid", "diversity"} and found.sampling.prompts == [""]


@pytest.mark.soak
def test_the_gan_in_the_box_is_made_by_its_recipe(tmp_path: Path) -> None:
    few = ["train.steps=2", "data.source=builtin:scenes?count=16&size=32"]
    phases: list[str] = []

    def make_again() -> dict[str, bytes]:
        phases.clear()
        out = make_gan_builtin(tmp_path / "work", tmp_path / "gan", few, lambda phase, *_: phases.append(phase))
        return {str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*") if file.is_file()}

    made = make_again()
    assert phases.count("workers") == 1
    shipped = builtin_folder("gan")
    assert {str(file.relative_to(shipped)) for file in shipped.rglob("*") if file.is_file()} == made.keys()
    assert open_family(str(tmp_path / "gan")).default_size == (32, 32)
    assert make_again() == made
    assert phases == []
