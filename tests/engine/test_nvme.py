"""train.zero.offload: nvme: what is offloaded lies in files, and nothing else is different from offload: cpu."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gtl.train.engine import Engine
from gtl.types import Batch, Losses
from tests.engine.group import Group
from tests.engine.runs import Kill, go, learned, make_job
from tests.engine.test_kill import FULL, KILLED, LORA, series
from tests.engine.test_loading import MIB, SLACK, highest
from tests.engine.test_state import assert_close, run_dry
from tests.engine.test_zero import run, run_wide
from tests.engine.toy import make_train

WIDTH = 1024
LAYER = 4 * WIDTH**2
SOAK = pytest.mark.soak


class Deep(nn.Module):
    """Linear layers, of which the last ones move."""

    def __init__(self, depth: int, trained: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(depth))
        for layer in self.layers[: depth - trained]:
            layer.requires_grad_(False)

    def forward(self, batch: Batch) -> Losses:
        """Something to descend."""
        x = batch.tensors["x"]
        for layer in self.layers:
            x = x + layer(x)
        return Losses(x.square().mean() / dist.get_world_size(), {})


def wrap(player: nn.Module, stage: int, **settings: Any) -> Engine:
    """An engine with two micro-batches a step."""
    trained = {name: parameter for name, parameter in player.named_parameters() if parameter.requires_grad}
    return Engine(
        player, trained, make_train(learning_rate=1e-4, **settings), stage=stage, micro_batch=1, accumulation=2,
        device="cpu", total_steps=9,
    )  # fmt: skip


def descend(engine: Engine, passes: int) -> None:
    """So many micro-batches, and the steps after every second one."""
    for number in range(passes):
        losses = engine(Batch({"x": torch.ones(1, WIDTH)}, torch.ones(1)))
        assert losses is not None
        engine.backward(losses.total)
        del losses
        if number % 2:
            engine.step()


def places(folder: str) -> dict[bool, int]:
    """Bytes of this process's larger tensors, each storage once: in files of a folder or not."""
    gc.collect()
    found: dict[int, tuple[bool, int]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects warn when they are asked what they are
        tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor) and not thing.is_meta]
    for tensor in tensors:
        for each in (tensor, tensor.grad if tensor.is_leaf else None):
            if each is not None and each.untyped_storage().data_ptr() and each.untyped_storage().nbytes() > LAYER // 4:
                storage = each.untyped_storage()
                found[storage.data_ptr()] = (storage.filename or "").startswith(folder), storage.nbytes()
    return {
        is_there: sum(nbytes for where, nbytes in found.values() if where is is_there) for is_there in (True, False)
    }


def locate(stage: int, folder: str) -> list[dict[bool, int]]:
    """Where the tensors of a player of six layers, of which four move, are: once made, and within the second step."""
    before = places(folder)
    engine = wrap(Deep(6, 4), stage, ema=0.9, zero={"offload": "nvme", "offload_folder": folder})
    found = [places(folder)]
    descend(engine, 3)
    found.append(places(folder))
    return [{key: each[key] - before[key] for key in each} for each in found]


@pytest.fixture(scope="module")
def fresh() -> Iterator[Group]:
    """Two processes in which nothing was before that may still go."""
    with Group(2) as group:
        yield group


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_all_that_is_offloaded_is_in_files(fresh: Group, tmp_path: Path, stage: int) -> None:
    # Of the four layers that move each of two workers has masters, their average, two moments and two gradients.
    share, gradients = 4 * LAYER // 2, 4 * LAYER
    for made, within in fresh.run(locate, stage, str(tmp_path)):
        if stage == 3:  # and weights; the buffer for gradients is there too, where the device is a CPU
            assert made == {False: 0, True: 7 * share + 2 * LAYER // 2 + gradients}
            assert within == made
            continue
        # The weights are on the device. Masters go back to it through a buffer, gradients come through two.
        assert made == {False: 6 * LAYER, True: 6 * share + 2 * LAYER}
        # Stage 1 keeps the gradient so far whole on the device, and the buffer that it is reduced in.
        assert within[True] == made[True] + (share if stage == 2 else 0)
        assert within[False] <= made[False] + (2 * gradients if stage == 1 else 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_disk_changes_no_bit(duo: Group, tmp_path: Path, stage: int) -> None:
    settings = {"offload": "nvme", "offload_folder": str(tmp_path)}
    expected, found = (duo.run(run, stage, zero)[0] for zero in ({"offload": "cpu"}, settings))
    assert found[:3] == expected[:3]
    assert_equal(found[3], expected[3])


def test_weights_that_are_read_anew_for_every_pass(duo: Group, tmp_path: Path) -> None:
    settings = {"offload": "nvme", "offload_folder": str(tmp_path)}
    expected, found = (duo.run(run_wide, zero)[0] for zero in ({"offload": "cpu"}, settings))
    assert found[0] == expected[0]
    assert_equal(found[1], expected[1])


def assert_equal(some: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    assert some.keys() == others.keys() != set()
    for name, value in some.items():
        assert torch.equal(value, others[name])


@pytest.mark.parametrize(("tuner", "kills"), [(LORA, []), (FULL, [Kill(1, "step", 6)])], ids=["lora", "full-killed"])
def test_a_run_with_a_disk_is_the_one_without(tmp_path: Path, tuner: dict[str, Any], kills: list[Kill]) -> None:
    folder = tmp_path / "scratch"
    folder.mkdir()
    straight = make_job(tmp_path / "straight", tuner, zero={"stage": 3, "offload": "cpu"})
    assert go(straight, 2) == [0, 0]
    zero = {"stage": 3, "offload": "nvme", "offload_folder": str(folder)}
    job = make_job(tmp_path / "disk", tuner, zero=zero)
    for kill in kills:
        assert go(job, 2, kill)[kill.rank] == KILLED
    assert go(job, 2) == [0, 0]
    assert learned(job) == learned(straight)
    assert series(job) == series(straight)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("there", [True, False])
def test_a_run_goes_on_with_a_disk_and_without(solo: Group, duo: Group, tmp_path: Path, there: bool) -> None:
    groups = [
        (duo, 3, {"ema": 0.8, "zero": {"offload": "nvme", "offload_folder": str(tmp_path)}}),
        (solo, 1, {"ema": 0.8}),
    ]
    (first, stage, settings), (second, other, others) = groups if there else groups[::-1]
    straight, straight_state = first.run(run_dry, str(tmp_path / "run"), stage, 0, 10, settings, 5)[0]
    resumed, resumed_state = second.run(run_dry, str(tmp_path / "run"), other, 5, 10, others)[0]
    assert [row["loss"] for row in resumed] == pytest.approx([row["loss"] for row in straight[5:]], rel=1e-5)
    assert_close(resumed_state, straight_state)


def anonymous_growth(source: str, depth: int, trained: int, offload: str, folder: str) -> tuple[int, int]:
    """Most anonymous bytes more while a model is placed; the same while it then learns, two steps."""
    wrap(Deep(2, 1), 3)  # all that is imported and set up once
    with torch.device("meta"):
        player = Deep(depth, trained)
    player.load_state_dict(load_file(source), assign=True)
    Deep.requires_grad_(player, False)
    for layer in player.layers[depth - trained :]:
        layer.requires_grad_(True)
    with highest() as placed:
        engine = wrap(player, 3, zero={"offload": offload, "offload_folder": folder})
    with highest() as learning:
        descend(engine, 4)
    return placed[0], learning[0]


@pytest.mark.parametrize("depth", [60, pytest.param(260, marks=SOAK)])
def test_a_process_holds_none_of_its_share_in_memory(tmp_path: Path, depth: int) -> None:
    source = str(tmp_path / "model.safetensors")
    save_file({f"layers.{i}.weight": torch.full((WIDTH, WIDTH), i / 2**20) for i in range(depth)}, source)
    with Group(1) as alone:  # where no weights are gathered, which would be on the device
        placed, learning = alone.run(anonymous_growth, source, depth, 1, "nvme", str(tmp_path))[0]
    with Group(1) as alone:
        kept, _ = alone.run(anonymous_growth, source, depth, 1, "cpu", str(tmp_path))[0]
    os.unlink(source)
    # One layer arrives at a time, and DeepSpeed makes one more of what it has pinned.
    assert placed < 2 * LAYER + SLACK
    assert learning < 6 * LAYER + SLACK  # the gradient of the one that moves, on its way through the device
    assert kept > depth * LAYER > 200 * MIB
