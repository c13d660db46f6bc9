"""Loss on held-out images: which they are, and what is measured on them, whatever the number of ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gtl.data.cache import Space
from gtl.data.dataset import Cuts, Dataset
from gtl.evaluate.validation import Validation
from gtl.storage import Store
from gtl.train.launch import count_learned
from gtl.types import Batch, Entry, Item, Losses, Record, UserError
from tests.engine.group import Group


def make_dataset(folder: Path, count: int = 7) -> Dataset:
    """Images of one number each, in two buckets."""
    Space(Store(folder), "images").write({f"key{i}": {"mean": torch.full((1,), float(i))} for i in range(count)})
    entries = [
        Entry(Record(f"images/{i}.png", f"sha{i}", (8, 8), ("a",), 1.0), (8, 8 * (1 + i % 2)), (f"key{i}",))
        for i in range(count)
    ]
    dataset = Dataset(Store(folder), entries, "images", None, Cuts(1, False, 0))
    dataset.refresh()
    return dataset


class Exact:
    """The loss of an image is 100 times its number, 10 times the stratum, and the noise, which is kept."""

    strata, judged, parts = 2, "error", ("x",)

    def __init__(self) -> None:
        self.noise: dict[tuple[float, float], float] = {}

    def draw(self, item: Item, rng: torch.Generator, stratum: int | None = None) -> dict[str, torch.Tensor]:
        noise = torch.rand(1, generator=rng)
        self.noise[float(item.latents["mean"]), float(stratum or 0)] = float(noise)
        return {"loss": 100 * item.latents["mean"] + 10 * torch.tensor([stratum]) + noise}

    def collate(self, samples: Any) -> dict[str, torch.Tensor]:
        return {"loss": torch.stack([sample["loss"] for sample in samples])}

    def __call__(self, batch: Batch) -> Losses:
        """The player."""
        self.calls = getattr(self, "calls", 0) + 1
        error = (batch.weight * batch.tensors["loss"][:, 0]).sum()
        return Losses(error * 2, {"error": error})


def measure(folder: str, batch_size: int) -> tuple[dict[str, float], int, dict[tuple[float, float], float]]:
    exact = Exact()
    options: Any = {"batch_size": batch_size, "rank": dist.get_rank(), "world": dist.get_world_size(), "seed": 3}
    validation = Validation(make_dataset(Path(folder) / str(dist.get_rank())), exact, **options)  # type: ignore[arg-type]
    first = validation.run(exact, torch.device("cpu"))
    assert validation.run(exact, torch.device("cpu")) == first
    return first, exact.calls // 2, exact.noise


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_losses_are_means_over_images_and_strata(duo: Group, solo: Group, tmp_path: Path, batch_size: int) -> None:
    (alone, _, noise) = solo.run(measure, str(tmp_path / "solo"), batch_size)[0]
    assert len(noise) == 7 * 2
    for stratum in (0, 1):
        expected = sum(100 * i + 10 * stratum + noise[i, stratum] for i in range(7)) / 7
        assert alone[f"val_loss_q{stratum + 1}"] == pytest.approx(expected, rel=1e-6)
    assert alone["val_loss"] == pytest.approx((alone["val_loss_q1"] + alone["val_loss_q2"]) / 2)
    (first, calls, _), (second, others, _) = duo.run(measure, str(tmp_path / "duo"), batch_size)
    assert first == second == pytest.approx(alone, rel=1e-6)
    assert calls == others  # or weights that are spread over ranks could not be gathered


def test_the_held_out_share_depends_on_the_images_alone(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, 40)
    trained, held_out = dataset.split(0.25)
    names = [{entry.record.sha256 for entry in side.entries} for side in (trained, held_out)]
    assert (len(names[0]), len(names[1]), names[0] & names[1]) == (30, 10, set())
    more = dataset._part([*dataset.entries, make_dataset(tmp_path / "more", 41).entries[40]])
    kept = {entry.record.sha256 for entry in more.split(0.25)[1].entries}
    assert len(kept & names[1]) >= 9
    twice = dataset._part([*dataset.entries, *dataset.entries])
    assert len(twice.split(0.25)[1].entries) == 20
    assert held_out.item(0, 0, 0).latents["mean"] == float(held_out.entries[0].variants[0].removeprefix("key"))
    assert dataset.split(0.0)[1].entries == []
    assert len(dataset.split(0.001)[1].entries) == 1


def test_class_images_are_never_held_out(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, 4)
    dataset.entries[1] = replace(dataset.entries[1], record=replace(dataset.entries[1].record, is_class_image=True))
    trained, held_out = dataset.split(0.5)
    assert "images/1.png" in {entry.record.uri for entry in trained.entries}
    assert len(held_out.entries) == 2
    assert count_learned(dataset, 0.5) == 1
    assert count_learned(dataset, 0.0) == 3
    with pytest.raises(UserError, match=r"^data\.validation: 0\.9: of 1 different images none is left to train on$"):
        make_dataset(tmp_path, 1).split(0.9)
