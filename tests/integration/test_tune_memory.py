"""A study whose trials run out of memory: one goes on with less at once, one that has no room at all is left behind."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle

from gtl.config import Study
from gtl.config.load import parse_study
from gtl.search import pack, tuning
from gtl.search.pack import PackActor
from gtl.search.study import tune
from gtl.search.trial import Trial
from gtl.storage import Store
from gtl.train import launch, worker
from gtl.train.halve import Limit, read_limit
from gtl.train.track import read_rows
from gtl.types import UserError

ROOM = 4
"""Of a device that is full: for so many rows of rank 1 at once."""
FULL = 2
"""It is from so many steps on."""
STEPS = 3
HELP = (
    "a worker ran out of memory; take train.activation_checkpointing: true, train.zero.stage: 3 on more workers, "
    "train.zero.offload: cpu, a smaller model or a lower data.resolution"
)


class Short(Trial):
    """A trial whose workers' devices fill up. Its process is its own, and ends with it."""

    def setup(self, *arguments: Any, **named: Any) -> None:
        launch.main = short_of_memory
        super().setup(*arguments, **named)


def short_of_memory(config: dict[str, Any]) -> None:
    """A worker's entry."""
    import torch

    from gtl.train.engine import Engine

    forward, rank = Engine.__call__, config["job"]["recipe"]["tuner"]["rank"]

    def short(self: Engine, batch: Any) -> Any:
        if torch.is_grad_enabled() and self.steps >= FULL and len(batch.weight) * rank > ROOM:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, batch)

    Engine.__call__ = short  # type: ignore[method-assign]
    worker.main(config)


@pytest.fixture
def full_devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = sys.modules[__name__]
    monkeypatch.setattr(tuning, "Trial", Short)
    cloudpickle.register_pickle_by_value(module)  # the processes of the cluster cannot import it
    yield
    cloudpickle.unregister_pickle_by_value(module)


def make_study(place: Path, together: int | str) -> Study:
    return parse_study({
        "recipe": {
            "model": {"source": "builtin:tiny"},
            "tuner": {"type": "lora"},
            "data": {"source": "builtin:scenes?count=8", "resolution": 64, "validation": 0.25},
            "train": {"steps": STEPS, "batch_size": 2, "workers": 1, "max_failures": 1,
                      "checkpoints": {"every": 1}},
            "evaluate": {"every": 1, "prompts": []},
            "storage": {name: str(place / name) for name in ("runs", "cache", "registry")},
        },
        "space": {"tuner.rank": {"choice": [4, 8]}}, "metric": "val_loss", "searcher": {"type": "grid"},
        "scheduler": {"type": "fifo"}, "confirm": {"top": 0}, "pack": together,
    })  # fmt: skip


def test_a_trial_goes_on_with_half_and_one_without_room_for_any_is_left_behind(
    ray_cluster: None, full_devices: None, tmp_path: Path
) -> None:
    record = tune(make_study(tmp_path, "off"), "short")
    halved, failed = record.trials["00000"], record.trials["00001"]
    assert (halved.state, halved.reason, halved.steps) == ("finished", None, STEPS)
    assert (failed.state, failed.steps) == ("failed", FULL)
    assert failed.reason == f"train.micro_batch: 1: {HELP}"
    for one in (halved, failed):
        run, looks = Store(one.run), list(range(1, one.steps + 1))
        assert read_limit(run) == Limit("auto", 1, 1)
        assert [row["step"] for row in read_rows(run) if row["step"]] == [look["step"] for look in one.looks] == looks
    assert failed.metrics["val_loss"] < halved.metrics["val_loss"]  # it would have won
    assert record.winner is not None and record.winner["trial"] == "00000"
    assert record.published == [f"short@{record.version}-00000"]
    left = json.loads(record.folder.read("study.json"))
    assert left["ended"] is not None and [one["reason"] for one in left["trials"]] == [None, failed.reason]
    assert record.folder.read("report.html").decode().count(f"failed: {failed.reason}") == 1


class FullPack(PackActor):
    """A pack whose device has no room for a single image beside the model."""

    def train(self, job: dict[str, Any], board: Any) -> None:
        """See there."""
        import torch

        from gtl.objectives.denoise import Denoiser

        def full(self: Denoiser, batch: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory.")

        Denoiser.forward = full  # type: ignore[method-assign]
        super().train(job, board)


def test_a_pack_without_room_for_an_image_is_one_line(
    ray_cluster: None, full_devices: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack, "PackActor", FullPack)
    with pytest.raises(UserError) as caught:
        tune(make_study(tmp_path, 2), "full")
    assert str(caught.value) == f"no trial ran to its end: model.source: builtin:tiny: {HELP}"
    (record,) = tmp_path.glob("runs/full/*/study.json")
    assert [one["state"] for one in json.loads(record.read_text())["trials"]] == ["failed"] * 2
