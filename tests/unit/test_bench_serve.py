"""`gtl bench serve`: all arms draw the same pictures, and figures are what they are called. No speed is asserted."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gtl.bench.drawing import Arms, Seconds
from gtl.bench.serve import Serving, bench_serve, summary, table
from gtl.types import UserError, quiet
from tests.loras import close
from tests.twins import TWINS

CPU = torch.device("cpu")
KEYS = {
    "model", "adapters", "requests", "batch", "rank", "targets", "steps", "rounds", "size", "resolution",
    "pictures_per_second", "mixed_to", "loading_share", "join", "peak_memory_bytes", "dtype", "device", "threads",
    "cores", "load_average", "torch", "gtl",
}  # fmt: skip


def unpacked(latents: Tensor, model: str, shape: tuple[int, ...]) -> Tensor:
    """Latents [1, C, h, w] as diffusers' pipeline hands them out; FLUX's are patches."""
    if model != "flux":
        return latents
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

    return FluxPipeline._unpack_latents(latents, 8 * shape[1], 8 * shape[2], 8)


@pytest.mark.parametrize("model", ["small", "sdxl", "flux"])
def test_all_arms_draw_the_same_pictures(model: str, tmp_path: Path) -> None:
    """Five requests over two adapters, at most three at once; to 1e-5 of the largest value."""
    serving = Serving(model=model, adapters=2, requests=5, batch=3, rank=4, targets="all-linear+conv", steps=3, size=64)
    arms = Arms(serving, tmp_path, CPU, TWINS[model])
    for arm in ("mixed", "merged", "single"):
        seconds = arms.draw(arm)
        assert seconds.clock > 0 and seconds.processor > 0
    found = {arm: [output.latents for output in outputs] for arm, outputs in arms.outputs.items()}
    shape = arms.family.latent_shape(*arms.size)
    drawn = [unpacked(latents, model, shape) for latents in arms.swapping.draw(arms.work)]
    assert arms.swapping.loading > 0
    assert [folder.name for _, folder in arms.work] == ["adapter0", "adapter1", "adapter0", "adapter1", "adapter0"]
    for turn, latents in enumerate(drawn):
        assert latents.isfinite().all() and latents.shape[1:] == shape
        assert close(found["mixed"][turn], latents)
        for alone in (found["merged"][turn], found["single"][turn]):
            assert close(alone, latents) == (turn % 2 == 0)
    assert arms.decode().clock > 0


def test_who_joins_is_drawn_and_leaves_nothing_behind(tmp_path: Path) -> None:
    serving = Serving(adapters=2, requests=4, batch=3, rank=2, size=64)
    arms = Arms(serving, tmp_path, CPU, TWINS["small"])
    waits = arms.join(2, random.Random(0))
    assert len(waits) == 2 and min(waits) > 0
    assert len(arms.engine) == 0
    arms.draw("mixed")
    assert [output.request.seed for output in arms.outputs["mixed"]] == [0, 1, 2, 3]


def test_figures_are_medians_over_rounds() -> None:
    def taken(mixed: float, merged: float, single: float, swapping: float) -> dict[str, Seconds]:
        arms = {"mixed": mixed, "merged": merged, "single": single, "swapping": swapping, "decoding": 0.5}
        return {name: Seconds(clock, clock**2) for name, clock in arms.items()}

    rounds = [taken(2.0, 1.0, 2.0, 8.0), taken(4.0, 3.0, 2.0, 4.0), taken(1.0, 1.0, 1.0, 3.0)]
    assert summary(8, rounds, [[1.0, 1.5], [2.5], [1.25]], [2.0, 3.0, 0.3]) == {
        "pictures_per_second": {"mixed": 4.0, "merged": 8.0, "single": 4.0, "swapping": 2.0, "decoding": 16.0},
        "mixed_to": {
            "merged": {"ratios": [0.5, 0.75, 1.0], "median": 0.75, "processor": 0.5625, "bar": 0.8},
            "single": {"ratios": [1.0, 0.5, 1.0], "median": 1.0, "processor": 1.0, "bar": 0.95},
            "swapping": {"ratios": [4.0, 1.0, 3.0], "median": 3.0, "processor": 9.0, "bar": 2.0},
        },
        "loading_share": 0.25,
        "join": {"steps": [1.0, 1.5, 2.5, 1.25], "median": 1.375, "worst": 2.5, "bar": 2.0},
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "sd3"}, "--model: 'sd3': choose from small, sd15, sd2, sdxl, flux, builtin:tiny"),
        ({"targets": "conv"}, "--targets: 'conv': choose from attention, attention+ff, all-linear, all-linear+conv"),
        ({"adapters": 0}, "--adapters: 0: must be 1 or more"),
        ({"rank": 0}, "--rank: 0: must be 1 or more"),
        ({"steps": 0}, "--steps: 0: must be 1 or more"),
        ({"rounds": 0}, "--rounds: 0: must be 1 or more"),
        ({"requests": 1}, "--requests: 1: must be 2 or more, so that one can join another"),
        ({"batch": 1}, "--batch: 1: must be 2 or more, so that one can join another"),
        ({"model": "builtin:tiny", "size": 30}, "height: 30: expected a multiple of 16, such as 16 or 32"),
    ],
)
def test_a_wrong_setting_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        bench_serve(Serving(**change), None, quiet)
    assert str(error.value) == message


def test_a_result_that_could_not_be_written_is_refused_before_it_is_measured() -> None:
    with pytest.raises(UserError, match=r"^--json: nowhere/x\.json: its folder does not exist$"):
        bench_serve(Serving(), Path("nowhere/x.json"), quiet)


def test_the_command_prints_a_table_and_writes_what_it_measured(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    options = [
        "--model=builtin:tiny",
        "--adapters=2",
        "--requests=2",
        "--batch=2",
        "--rank=2",
        "--steps=2",
        "--rounds=1",
    ]
    command = [Path(sys.executable).with_name("gtl"), "bench", "serve", *options, "--json", file]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result = json.loads(file.read_text())
    assert result.keys() == KEYS
    assert (result["model"], result["resolution"], result["requests"]) == ("builtin:tiny", [64, 64], 2)
    assert result["mixed_to"].keys() == {"merged", "single", "swapping"}
    assert all(found["ratios"] == [found["median"]] and found["median"] > 0 for found in result["mixed_to"].values())
    assert len(result["join"]["steps"]) == 4 and 0 < result["loading_share"] < 1
    assert done.stdout == table(result) + "\n"
    rows = [line.split("  ")[0] for line in done.stdout.splitlines()]
    assert rows == [
        "model", "requests", "hardware", "mixed", "merged", "single", "swapping", "join", "memory", "software",
    ]  # fmt: skip
    assert done.stderr.splitlines()[0] == "model builtin:tiny"
    assert done.stderr.splitlines()[-1].startswith("rounds 1/1 as fast as merged ")
