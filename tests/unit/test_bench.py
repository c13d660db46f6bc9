"""`gtl bench train`: the command as a user runs it, its arithmetic, and its refusals."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gtl.bench.configs import MODELS
from gtl.bench.matrices import matmul_flops
from gtl.bench.models import write_configs, write_dataset, write_model
from gtl.bench.scaling import bench_scaling
from gtl.bench.setting import Setting, settle
from gtl.bench.train import Round, bench_train, summary
from gtl.families import open_family
from gtl.storage import Store
from gtl.types import UserError, quiet
from tests.twins import TWINS

KEYS = {
    "model", "resolution", "batch_size", "steps", "rounds", "tuner", "compile", "checkpointing", "micro_batch",
    "bare_batch_size", "bare_checkpointing", "gtl_images_per_second", "bare_images_per_second", "speedup", "ratios",
    "median_ratio", "matmul_flops", "flops_per_image", "gtl_utilisation", "bare_utilisation", "data_wait", "gtl_loss",
    "bare_loss", "peak_memory_bytes", "dtype", "device", "threads", "cores", "load_average", "torch", "gtl",
}  # fmt: skip


def test_the_command_prints_a_table_and_writes_what_it_measured(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    # A process of its own: DeepSpeed keeps the first process group it meets for as long as the process lives.
    command = [Path(sys.executable).with_name("gtl"), "bench", "train", "--batch-size=2", "--steps=2", "--rounds=1"]
    done = subprocess.run([*command, "--json", file], check=True, capture_output=True, text=True)
    result = json.loads(file.read_text())
    assert result.keys() == KEYS
    assert (result["model"], result["resolution"], result["batch_size"]) == ("small", [128, 128], 2)
    assert math.isfinite(result["gtl_loss"]) and math.isfinite(result["bare_loss"])
    assert result["gtl_images_per_second"] > 0 and result["bare_images_per_second"] > 0
    assert result["ratios"] == [result["median_ratio"]]
    assert result["speedup"] == result["gtl_images_per_second"] / result["bare_images_per_second"]
    assert result["flops_per_image"] == pytest.approx(1.579e9, rel=1e-3)
    assert 0 < result["gtl_utilisation"] < 1 and 0 < result["bare_utilisation"] < 1
    assert 0 <= result["data_wait"] < 1
    rows = [line.split("  ")[0] for line in done.stdout.splitlines()]
    assert rows == [
        "model", "hardware", "matrices", "gtl", "bare", "speedup", "gtl / bare", "memory", "software",
    ]  # fmt: skip
    assert done.stderr.splitlines()[0] == "model small"
    assert done.stderr.splitlines()[-1] == f"rounds 1/1 gtl / bare {result['median_ratio']:.3f}"


def test_the_figures_of_rounds_are_medians() -> None:
    rounds = [Round(6.0, 0.5, 12.0, 0.4, 0.1), Round(4.0, 0.5, 3.0, 0.4, 0.3), Round(10.0, 0.6, 11.0, 0.7, 0.2)]
    assert summary(rounds, flops_per_image=2e12, rate=48e12) == {
        "gtl_images_per_second": 6.0, "bare_images_per_second": 11.0, "speedup": 6 / 11, "ratios": [2.0, 0.75, 1.1],
        "median_ratio": 1.1, "matmul_flops": 48e12, "flops_per_image": 2e12, "gtl_utilisation": 0.25,
        "bare_utilisation": 22 / 48, "data_wait": 0.2, "gtl_loss": 0.6, "bare_loss": 0.7,
    }  # fmt: skip


def test_the_rate_of_matrix_products_is_one_that_a_machine_can_have() -> None:
    assert 1e9 < matmul_flops(torch.device("cpu"), torch.float32) < 1e13


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "sd3"}, "--model: 'sd3': choose from small, sd15, sd2, sdxl, flux, builtin:tiny"),
        ({"tuner": "dora"}, "--tuner: 'dora': choose from lora, full"),
        ({"steps": 0}, "--steps: 0: must be 1 or more"),
        ({"rounds": 0}, "--rounds: 0: must be 1 or more"),
        ({"batch_size": -1}, "--batch-size: -1: must be 1 or more"),
        ({"bare_batch_size": 0}, "--bare-batch-size: 0: must be 1 or more"),
        ({"micro_batch": 0}, "--micro-batch: 0: must be 1 or more"),
        ({"micro_batch": 5}, "--micro-batch: 5: must be at most --batch-size, which is 4"),
    ],
)
def test_a_wrong_setting_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        bench_train(Setting(**change), None, quiet)
    assert str(error.value) == message


def test_a_result_that_could_not_be_written_is_refused_before_it_is_measured() -> None:
    with pytest.raises(UserError, match=r"^--json: nowhere/x\.json: its folder does not exist$"):
        bench_train(Setting(), Path("nowhere/x.json"), quiet)


def test_compiling_without_a_compiler_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with pytest.raises(UserError, match=r"^--compile: no C\+\+ compiler on this machine; "):
        bench_train(Setting(compile=True), None, quiet)


def test_with_workers_there_is_no_bare_loop() -> None:
    with pytest.raises(UserError, match=r"^--bare-batch-size, --bare-checkpointing: with --workers there is no bare"):
        bench_scaling(Setting(bare_batch_size=1), [1], 0, None, quiet)


def test_numbers_that_are_left_out_are_those_of_the_batch() -> None:
    settled = settle(Setting(batch_size=6), None)
    assert (settled.micro_batch, settled.bare_batch_size) == (6, 6)
    train, bare = settled.recipe("x").train, replace(settled, bare_batch_size=1).bare_recipe("x").train
    assert (train.batch_size, train.micro_batch, bare.batch_size) == (6, 6, 1)


def test_only_the_loop_that_is_asked_to_compiles_and_recomputes() -> None:
    setting = settle(Setting(tuner="full", checkpointing=True), None)
    loops = setting.recipe("x"), setting.bare_recipe("x")
    assert [recipe.tuner.type for recipe in loops] == ["full", "full"]
    assert [recipe.train.activation_checkpointing for recipe in loops] == [True, False]
    assert replace(setting, bare_checkpointing=True).bare_recipe("x").train.activation_checkpointing
    setting = Setting(compile=True)
    assert (setting.recipe("x").train.compile, setting.bare_recipe("x").train.compile) == (True, False)


@pytest.mark.parametrize(
    ("name", "billions", "size", "conditions"),
    [
        ("sd15", 0.860, 512, {"encoder_hidden_states": (77, 768)}),
        ("sd2", 0.866, 512, {"encoder_hidden_states": (77, 1024)}),
        ("sdxl", 2.567, 1024, {"encoder_hidden_states": (77, 2048), "text_embeds": (1280,)}),
        ("flux", 11.901, 1024, {"encoder_hidden_states": (512, 4096), "pooled_projections": (768,)}),
    ],
)
def test_a_model_has_the_size_of_the_published_one(
    name: str, billions: float, size: int, conditions: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    write_configs(tmp_path / "model", name)
    family = open_family(str(tmp_path / "model"))
    main = family.load(family.main, device="meta")
    assert sum(parameter.numel() for parameter in main.parameters()) / 1e9 == pytest.approx(billions, abs=5e-4)
    assert family.default_size == (size, size)
    item = write_dataset(Store(tmp_path / "cache"), family, 1, "bf16").item(0, 0, 0)
    assert {key: tuple(value.shape) for key, value in item.conditions.items()} == conditions
    assert {value.dtype for value in item.conditions.values()} == {torch.bfloat16}


def test_weights_in_several_files_are_those_in_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = write_model(tmp_path / "one", "flux", "bf16", TWINS["flux"])
    monkeypatch.setattr("gtl.bench.models.SHARD_BYTES", 50_000)
    several = write_model(tmp_path / "several", "flux", "bf16", TWINS["flux"])
    assert len(list((tmp_path / "several" / "transformer").glob("*.safetensors"))) > 2
    tensors = dict(one.weights("transformer"))
    assert tensors.keys() == one.load("transformer").state_dict().keys()
    assert all(torch.equal(value, tensors[name]) for name, value in several.weights("transformer"))
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16}
    std = {name: float(value.float().std()) for name, value in tensors.items() if value.ndim > 1}
    assert min(std.values()) == pytest.approx(0.02, rel=0.1) and max(std.values()) == pytest.approx(0.02, rel=0.1)
    assert {float(value.float().mean()) for name, value in tensors.items() if value.ndim == 1} == {0.0, 1.0}


def test_every_model_has_a_twin() -> None:
    assert TWINS.keys() == MODELS.keys()


def test_workers_learn_the_same_from_the_same_batches(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    command = [Path(sys.executable).with_name("gtl"), "bench", "train", "--batch-size=2", "--steps=2", "--rounds=1"]
    wanted = ["--workers=1", "--workers=2", "--stage=2", "--json", file]
    done = subprocess.run([*command, *wanted], check=True, capture_output=True, text=True)
    result = json.loads(file.read_text())
    assert (result["batch_size"], result["stage"]) == (2, 2)
    one, two = result["rows"]
    assert (one["workers"], two["workers"]) == (1, 2)
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
    assert min(one["images_per_second"], two["images_per_second"]) > 0
    assert len(done.stdout.splitlines()) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers=0"], "--workers: [0]: each must be 1 or more"),
        (["--workers=1", "--stage=4"], "--stage: 4: must be from 0 to 3"),
    ],
)
def test_a_wrong_number_of_workers_is_one_line(arguments: list[str], message: str) -> None:
    command = [Path(sys.executable).with_name("gtl"), "bench", "train", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, f"error: {message}")
