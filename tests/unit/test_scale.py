"""Steps, communication and costs on clusters that are not there: closed forms."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gtl.bench import predicting
from gtl.bench.predicting import Seen, Speeds
from gtl.bench.scaling import bench_scaling
from gtl.bench.setting import Setting, settle
from gtl.cli import main
from gtl.config import Recipe, parse_recipe
from gtl.train.assemble import Trainee
from gtl.train.footprint import Activations, Block, Footprint, measure
from gtl.train.forecast import as_json, forecast, parse_cluster, render
from gtl.train.gpus import GPUS
from gtl.train.outlook import LINK, UTILIZATION, Asked, layouts
from gtl.train.pace import Pace, Rates, pace
from gtl.train.plan import choose
from gtl.train.traffic import Layout, Links, Traffic, all_reduce, gather, traffic
from gtl.train.work import Work
from gtl.types import UserError, quiet

T, FROZEN = 8_000_000, 1_000_000_000
"""Trained weights, and bytes of frozen ones."""
SIZES = Footprint(
    parts={"unet": FROZEN // 2},
    blocks=(Block("a", 150_000_000, 0, 300_000_000), Block("b", 50_000_000, 0, 100_000_000)), frozen_bytes=FROZEN,
    trained=T, fixed=Activations(0, 0), per_image=Activations(1, 1), work=Work(1e12, 2e12, 0.5e12), modules=10,
)  # fmt: skip
LINKS = Links(inner=100e9, outer=50e9, latency=0.0)
RATES = Rates(flops=100e12, memory=math.inf, links=LINKS, overlap=False)
W = FROZEN + 4 * T


def recipe(**train: Any) -> Recipe:
    return parse_recipe({"model": {"source": "some/model"}, "data": {"source": "photos"}, "train": train})


def step(
    stage: int, nodes: int, rates: Rates = RATES, sizes: Footprint = SIZES, batch_size: int = 512, **train: Any
) -> Pace:
    """With one forward pass, on machines of 8."""
    layout, asked = Layout(nodes, 8 * nodes), recipe(batch_size=batch_size, **train).train
    size = math.ceil(batch_size / layout.workers)
    return pace(sizes, asked, layout, rates, stage=stage, micro_batch=size, accumulation=1)


def test_a_gather_is_a_ring_within_machines_and_one_between_them() -> None:
    assert gather(1e9, Layout(1, 1), LINKS) == 0 == all_reduce(1e9, Layout(1, 1), LINKS, 7)
    assert gather(1e9, Layout(1, 8), LINKS) == pytest.approx(7 / 8 * 1e9 / 100e9)
    assert gather(1e9, Layout(4, 4), LINKS) == pytest.approx(3 / 4 * 1e9 / 50e9)  # a worker each
    assert gather(1e9, Layout(4, 32), LINKS) == pytest.approx(7 / 8 * 1e9 / 100e9 + 3 / 4 * 1e9 / 50e9)
    assert all_reduce(1e9, Layout(1, 8), LINKS) == pytest.approx(2 * 7 / 8 * 1e9 / 100e9)
    slow = replace(LINKS, latency=0.5)
    assert gather(1e9, Layout(1, 8), slow, 3) - gather(1e9, Layout(1, 8), LINKS) == pytest.approx(1.5)
    assert all_reduce(1e9, Layout(1, 8), slow, 3) - all_reduce(1e9, Layout(1, 8), LINKS) == pytest.approx(1.5)


def test_what_each_stage_sends() -> None:
    layout = Layout(4, 32)

    def sent(stage: int, **more: Any) -> Traffic:
        return traffic(SIZES, layout, LINKS, stage=stage, **{"accumulation": 1, **more})

    unit, whole = gather(4 * T, layout, LINKS), gather(W, layout, LINKS)
    assert [sent(stage).total / unit for stage in (0, 1, 2)] == pytest.approx([2, 3, 3])
    assert (sent(0).alone, sent(1).alone, sent(2).alone, sent(3).alone) == pytest.approx((2 * unit, unit, unit, 0))
    assert (sent(3).forward, sent(3).backward) == pytest.approx((whole, whole + unit))
    # Of three micro-batches, stage 2 reduces each and stage 3 gathers for each.
    assert [sent(stage, accumulation=3).total for stage in (0, 1, 2, 3)] == pytest.approx(
        [2 * unit, 3 * unit, 7 * unit, 3 * (2 * whole + unit)]
    )


def test_what_is_gathered_for_the_backward_pass() -> None:
    layout = Layout(2, 16)

    def back(sizes: Footprint = SIZES, **more: Any) -> float:
        found = traffic(sizes, layout, LINKS, stage=3, accumulation=1, **more)
        return found.backward - gather(4 * T, layout, LINKS)

    assert back() == pytest.approx(gather(W, layout, LINKS))
    frozen = replace(SIZES, work=replace(SIZES.work, unreached=("a",)))
    assert back(frozen) == pytest.approx(gather(W - 300_000_000, layout, LINKS))
    # Block a has more weights than stay for the backward pass behind the recomputed forward one, b has not.
    assert back(checkpointing=True) == pytest.approx(gather(W + 300_000_000, layout, LINKS))
    assert back(hpz=8) == pytest.approx(7 / 8 * W / LINKS.inner)
    assert back(hpz=16) == pytest.approx(back())


def test_a_single_worker_sends_nothing() -> None:
    for stage in range(4):
        found = pace(SIZES, recipe().train, Layout(1, 1), RATES, stage=stage, micro_batch=4, accumulation=1)
        assert (found.sent, found.waited, found.communication, found.most) == (0, 0, 0, 0)
        assert found.step == pytest.approx(4 * 3e12 / 100e12)


def test_twice_the_machines_take_half_the_arithmetic() -> None:
    one, two, four = (step(0, nodes) for nodes in (1, 2, 4))
    assert one.compute == pytest.approx(512 / 8 * 3e12 / 100e12)
    assert (one.compute, two.compute) == pytest.approx((2 * two.compute, 2 * four.compute))
    assert one.communication < two.communication < four.communication  # sent is the same and more, beside less
    assert one.step > two.step > four.step
    assert one.device_hours(1000) < two.device_hours(1000) < four.device_hours(1000)


def test_the_share_of_communication_is_that_of_the_formula() -> None:
    layout = Layout(4, 32)
    unit, whole = gather(4 * T, layout, LINKS), gather(W, layout, LINKS)
    compute = 16 * 3e12 / 100e12
    for stage, sent in ((0, 2 * unit), (1, 3 * unit), (2, 3 * unit), (3, 2 * whole + unit)):
        assert step(stage, 4).communication == pytest.approx(sent / (sent + compute))
    assert step(0, 4).communication < step(2, 4).communication < step(3, 4).communication


def test_on_gpus_only_what_is_longer_than_arithmetic_is_waited_for() -> None:
    hidden = replace(RATES, overlap=True)
    unit = gather(4 * T, Layout(4, 32), LINKS)
    assert [step(stage, 4, hidden).waited for stage in range(4)] == pytest.approx([2 * unit, unit, unit, 0])
    slow = replace(hidden, links=Links(LINKS.inner, 1e9, 0.0))
    whole, unit = gather(W, Layout(4, 32), slow.links), gather(4 * T, Layout(4, 32), slow.links)
    forward, backward = 16 * 1e12 / 100e12, 16 * 2e12 / 100e12
    assert step(3, 4, slow).waited == pytest.approx(whole - forward + whole + unit - backward)
    assert step(3, 4, slow).most == step(3, 4, replace(slow, overlap=False)).communication


def test_an_adapter_reduces_only_itself() -> None:
    full = replace(SIZES, trained=100 * T, frozen_bytes=0)
    assert step(0, 4, sizes=full).sent == pytest.approx(100 * step(0, 4).sent)
    weights = gather(FROZEN, Layout(4, 32), LINKS)
    assert step(3, 4).sent == pytest.approx(2 * weights + 3 * gather(4 * T, Layout(4, 32), LINKS))


def test_recomputation_and_the_optimizer() -> None:
    again = step(0, 1, activation_checkpointing=True)
    assert again.compute == pytest.approx(step(0, 1).compute * 3.5 / 3)
    memory = replace(RATES, memory=1e9)
    assert step(0, 2, memory).optimizer == pytest.approx(28 * T / 1e9)
    assert step(1, 2, memory).optimizer == pytest.approx(28 * T / 16 / 1e9)
    assert step(0, 2, memory, ema=0.99).optimizer == pytest.approx(40 * T / 1e9)


def test_costs_are_arithmetic() -> None:
    found = Pace(0, Layout(2, 16), 1, 1, 32, compute=3.0, optimizer=0.5, sent=9.0, waited=0.5)
    assert (found.step, found.communication, found.images_per_second) == (4.0, 0.125, 8.0)
    assert found.most == 9 / 12.5
    assert found.device_hours(1000) == pytest.approx(16 * 125 / 3600)


@pytest.fixture(scope="module")
def tiny() -> Recipe:
    """The built-in model, 100 steps of 64 images."""
    return parse_recipe({
        "model": {"source": "builtin:tiny"}, "data": {"source": "photos", "resolution": 64},
        "train": {"batch_size": 64, "steps": 100},
    })  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def measured_once() -> Iterator[None]:
    """What the built-in model takes is the same in every recipe here."""
    known: dict[str, Footprint] = {}

    def once(recipe: Recipe, trainee: Trainee, device: str) -> Footprint:
        return known[device] if device in known else known.setdefault(device, measure(recipe, trainee, device))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gtl.train.forecast.measure", once)
        yield


def test_work_is_what_torch_counts_of_a_real_step(tiny: Recipe) -> None:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from gtl.families import open_family
    from gtl.train.assemble import assemble, outline
    from gtl.train.flops import FlopMeter
    from gtl.train.footprint import make_batch, make_item
    from gtl.train.place import place

    made = tiny.model_copy(update={"model": tiny.model.model_copy(update={"dtype": "fp32"})})
    work = measure(made, outline(made, "fp32", open_family("builtin:tiny", weights=False))).work
    trainee = assemble(made, "fp32")
    (player,) = trainee.players.values()
    place(player, trainee.dtype, "cpu")
    fake = make_batch(trainee, make_item(made, trainee.family), 2, FakeTensorMode())
    tensors = {
        name: torch.zeros(value.shape, dtype=value.dtype) for name, value in fake.tensors.items()
    }  # fmt: skip
    batch, meter = replace(fake, tensors=tensors, weight=torch.full((2,), 0.5)), FlopMeter()
    with meter.forward(batch):
        losses = player(batch)
    with meter.backward():
        losses.total.backward()
    assert meter.take() == pytest.approx(2 * work.of_image(checkpointing=False))
    assert work.forward > work.again > 0
    assert work.of_image(checkpointing=True) == work.forward + work.backward + work.again


def test_the_table_goes_through_machines_and_stages(tiny: Recipe) -> None:
    found = forecast(tiny, "6x8xH100", quiet, Asked(price=2.0, network=800.0, utilization=0.5))
    assert found.outlook is not None and found.plan is not None
    lines = found.outlook.lines
    assert [(line.pace.layout.nodes, line.pace.stage) for line in lines] == [
        (nodes, stage) for nodes in (1, 2, 4, 6) for stage in range(4)
    ]
    assert {line.pace.stage for line in lines if line.chosen} == {found.plan.stage}
    rates, gpu = found.outlook.rates, GPUS["H100"]
    assert (rates.flops, rates.overlap) == (gpu.flops / 2, True)
    assert (rates.links.inner, rates.links.outer) == pytest.approx((LINK * gpu.inner, LINK * 100e9))
    values = json.loads(json.dumps(as_json(found)))["outlook"]
    first = values["lines"][0]["pace"]
    assert first["run_hours"] == pytest.approx(100 * first["step"] / 3600)
    assert first["gpu_hours_per_1000_images"] == pytest.approx(8 * 1000 / 64 * first["step"] / 3600)
    assert first["dollars_per_1000_images"] == pytest.approx(2 * first["gpu_hours_per_1000_images"])
    assert first["run_dollars"] == pytest.approx(2 * 8 * first["run_hours"])
    text = render(found, tiny)
    (header,) = (line for line in text.splitlines() if line.startswith("nodes"))
    assert header.split() == (
        ["nodes", "GPUs", "stage", "micro-batch", "step", "s", "images/s", "communication", "at", "most", "GPU-h", "$"]
        + ["run", "h", "run", "$"]
    )
    for said in ("50% of H100's peak", "450 GB/s", "800 Gbit/s (--network)", "$2 an hour of a GPU (--price)"):
        assert said in text


def test_what_is_not_said_is_assumed_and_told(tiny: Recipe) -> None:
    found = forecast(tiny, "2x4xA100")
    assert found.outlook is not None
    assert found.outlook.network == 800  # 4 cards of 200 Gbit/s
    assert found.outlook.rates.flops == UTILIZATION * GPUS["A100"].flops
    text = render(found, tiny)
    assert "no price (--price)" in text and "$" not in text
    assert as_json(found)["outlook"]["lines"][0]["pace"]["dollars_per_1000_images"] is None


def test_a_given_number_of_workers_is_not_varied(tiny: Recipe) -> None:
    asked = tiny.model_copy(update={"train": tiny.train.model_copy(update={"workers": 16})})
    assert list(layouts(asked, parse_cluster("8x8xH100"))) == [Layout(2, 16)]
    grouped = recipe(zero={"stage": 3, "hpz": 16})
    assert [layout.nodes for layout in layouts(grouped, parse_cluster("8x8xH100"))] == [2, 4, 8]


@pytest.mark.parametrize(
    ("cluster", "train", "reason"),
    [
        ("8x48GiB", {}, "of 48GiB only the memory is known; kinds with rates are B200, "),
        (
            "8xH100",
            {"gpus_per_worker": 0},
            "of CPUs nothing is known beforehand; gtl bench train --workers 1 --predict",
        ),
        ("8xH100", {"zero": {"offload": "cpu"}}, "train.zero.offload: cpu: how fast machines step the optimizer is "),
    ],
)
def test_where_no_times_are_known_memory_still_is(cluster: str, train: Any, reason: str, tiny: Recipe) -> None:
    values = tiny.model_dump(mode="json")
    made = parse_recipe({**values, "train": {**values["train"], **train}})
    found = forecast(made, cluster)
    assert found.outlook is None and found.rows
    (line,) = (line for line in render(found, made).splitlines() if line.startswith("times"))
    assert line.startswith(f"times: not predicted: {reason}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--cluster", "0x8xH100"],
            "--cluster 0x8xH100: expected NODESxGPUSxKIND, such as 8x8xH100, where KIND is one",
        ),
        (["--cluster", "8x8xTPU"], "--cluster 8x8xTPU: expected NODESxGPUSxKIND, such as 8x8xH100, where KIND is"),
        (["--cluster", "8xH100", "--price", "-1"], "--price: -1: dollars for an hour of one GPU, 0 or more"),
        (["--cluster", "8xH100", "--price", "nan"], "--price: nan: dollars for an hour of one GPU, 0 or more"),
        (["--cluster", "8xH100", "--network", "0"], "--network: 0: Gbit/s of one machine, more than 0"),
        (
            ["--cluster", "8xH100", "--utilization", "1.5"],
            "--utilization: 1.5: a share of the peak, more than 0 and at",
        ),
        (
            ["--cluster", "8xH100", "--utilization", "0"],
            "--utilization: 0: a share of the peak, more than 0 and at most",
        ),
    ],
)
def test_what_cannot_be_is_one_line(
    options: list[str], message: str, tiny: Recipe, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    (tmp_path / "r.yaml").write_text(json.dumps(tiny.model_dump(mode="json")))
    monkeypatch.setattr(sys, "argv", ["gtl", "plan", str(tmp_path / "r.yaml"), *options])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert re.fullmatch(rf"error: {re.escape(message)}.*", capsys.readouterr().err.splitlines()[-1])


def test_measured_workers_are_predicted_from_the_first() -> None:
    """Seconds that the model itself makes are found again, from speeds twice what training attains."""
    made = settle(Setting(batch_size=8), None).recipe("x")
    true = [Speeds(100e12, 1e12, math.inf, 0.0), Speeds(100e12, 1e12, 1e9, 1e-3), Speeds(50e12, 1e12, 5e8, 1e-3)]
    seen = [Seen(workers, 0.0, 0.0, 0.0, speeds) for workers, speeds in zip((1, 2, 4), true, strict=True)]
    for stage in range(4):
        steps = [predicting.step_at(SIZES, made, stage, one, 0.5).step for one in seen]
        clocked = [replace(one, step=seconds) for one, seconds in zip(seen, steps, strict=True)]
        found = predicting.rows(clocked, predicting.predict(SIZES, made, stage, clocked))
        assert [row["error"] for row in found] == pytest.approx([0, 0, 0], abs=1e-9)
        assert found[0]["predicted_communication"] == 0 < found[1]["predicted_communication"]
    late = [clocked[0], replace(clocked[1], step=2 * steps[1])]
    assert predicting.rows(late, predicting.predict(SIZES, made, 3, late))[1]["error"] == pytest.approx(-0.5)
    lines = predicting.table({"wall": found, "processor": found}).splitlines()
    assert [line.split()[:1] for line in lines] == [
        ["workers"], *[["1"], ["2"], ["4"]] * 2, [], ["workers"], ["1"], ["2"], ["4"]
    ]  # fmt: skip


def test_what_no_image_adds_is_found_from_steps_of_fewer() -> None:
    """Of seconds that the model itself makes; without them the second is predicted too fast by what is fixed."""
    for micro_batch, accumulation in ((8, 1), (4, 2)):
        setting = settle(Setting(batch_size=8, micro_batch=micro_batch), None)
        made, speeds = setting.recipe("x"), Speeds(100e12, 1e12, 1e9, 0.0)
        first, second = (Seen(workers, 0.0, 0.0, 0.0, speeds) for workers in (1, 2))
        less = predicting.halved(setting, 1, choose(made, workers=1, steps_per_epoch=1))
        assert less is not None and (less.batch_size, less.micro_batch) == (4, micro_batch // 2)
        for stage in range(4):
            steps = [predicting.step_at(SIZES, made, stage, one, 0.5, 0.1).step for one in (first, second)]
            of_fewer = predicting.step_at(SIZES, less.recipe("x"), stage, first, 0.5, 0.1).step
            clocked = [replace(one, step=seconds) for one, seconds in zip((first, second), steps, strict=True)]
            blind = predicting.predict(SIZES, made, stage, clocked)
            told = replace(clocked[0], fewer=(less.micro_batch, of_fewer))
            found = predicting.predict(SIZES, made, stage, [told, clocked[1]])
            assert [one.step for one in found] == pytest.approx(steps)
            second_passes = choose(made, workers=2, steps_per_epoch=1).accumulation
            assert steps[1] - blind[1].step == pytest.approx(0.1 * (second_passes - accumulation / 2))
    assert predicting.halved(setting, 1, replace(choose(made, workers=1, steps_per_epoch=1), micro_batch=1)) is None


def test_a_clock_that_tells_nonsense_of_fewer_images_is_bounded() -> None:
    """A step of half as many that took longer, or no time at all."""
    made, speeds = settle(Setting(batch_size=8), None).recipe("x"), Speeds(100e12, 1e12, math.inf, 0.0)
    for step, launch in ((2.0, 0.9), (0.0, 0.0)):
        one = Seen(1, 1.0, 0.0, 0.0, speeds, fewer=(4, step))
        (found,) = predicting.predict(SIZES, made, 0, [one])
        alone = predicting.predict(SIZES, made, 0, [replace(one, fewer=None)])[0]
        assert found.step == pytest.approx(1.0) == alone.step
        two = predicting.predict(SIZES, made, 0, [one, replace(one, workers=2, fewer=None)])[1]
        spent = alone.compute
        assert two.compute == pytest.approx(spent * (launch + (1 - launch) / 2))


def test_workers_are_measured_and_predicted(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    command = [Path(sys.executable).with_name("gtl"), "bench", "train", "--batch-size=2", "--steps=2", "--rounds=1"]
    wanted = ["--workers=1", "--workers=2", "--stage=3", "--tuner=full", "--predict", "--json", file]
    done = subprocess.run([*command, *wanted], check=True, capture_output=True, text=True)
    result = json.loads(file.read_text())
    assert [row["step"] for row in result["rows"]] == [row["step"] for row in result["predicted"]["wall"]]
    for one, two in result["predicted"].values():
        assert one["predicted_step"] == pytest.approx(one["step"]) and one["predicted_communication"] == 0
        assert two["error"] == two["predicted_step"] / two["step"] - 1
        assert 0 <= two["late"] < 1 and 0 < two["communication"] < 1 and 0 < two["predicted_communication"] < 1
        assert min(two["flops"], two["memory"], two["link"], two["latency"]) > 0
    assert len(done.stdout.splitlines()) == 3 + 1 + 5 + 1 + 3


def test_predicting_is_refused_where_it_measures_nothing(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["gtl", "bench", "train", "--predict"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: --predict: is of numbers of workers; add ")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(UserError, match=r"^--predict: measures calls of gloo, between CPUs; hide the GPUs with "):
        bench_scaling(Setting(), [1], 0, None, quiet, predicts=True)
