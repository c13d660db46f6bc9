"""`gtl plan`: a model that is too large for this machine, from its config files alone."""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gtl.cli import main
from gtl.config import Recipe, parse_recipe
from gtl.families.source import resolve
from gtl.storage import Store
from gtl.train.assemble import Trainee
from gtl.train.footprint import Footprint, measure
from gtl.train.forecast import GIB, Forecast, Hardware, Row, as_json, count, forecast, parse_cluster, render
from gtl.train.plan import need
from gtl.types import UserError
from tests.tiny import make_flux, write_json

FLUX = {
    "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24,
    "joint_attention_dim": 4096, "axes_dims_rope": [16, 56, 56], "in_channels": 64,
}  # fmt: skip
"""As FLUX.1 dev has it, but for the pooled text."""
T5 = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FLUX.1 dev without weights; CLIP and the codec are small."""
    folder = make_flux(tmp_path_factory.mktemp("flux"))
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    for part, values in {"transformer": FLUX, "text_encoder_2": T5, "vae": {"latent_channels": 16}}.items():
        config = folder / part / "config.json"
        write_json(config, json.loads(config.read_text()) | values)
    return folder


@pytest.fixture(scope="module", autouse=True)
def measured_once() -> Iterator[None]:
    """Recipes that differ in their batch size alone are measured once: the sizes are of any number of images."""
    known: dict[str, Footprint] = {}

    def once(recipe: Recipe, trainee: Trainee, device: str) -> Footprint:
        train = recipe.train.model_copy(update={"batch_size": 1})
        key = f"{recipe.model_copy(update={'train': train})!r} {trainee.dtype} {device}"
        return known[key] if key in known else known.setdefault(key, measure(recipe, trainee, device))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gtl.train.forecast.measure", once)
        yield


def recipe(flux: Path, **sections: Any) -> Any:
    data = {"source": "photos", "resolution": 1024}
    return {"model": {"source": str(flux)}, "data": data, "train": {"batch_size": 64}, **sections}


@pytest.fixture(scope="module")
def lora(flux: Path) -> Forecast:
    """A LoRA of it on eight GPUs."""
    return forecast(parse_recipe(recipe(flux)), "8xH100")


def test_a_lora_of_twelve_billion_parameters_on_eight_gpus(lora: Forecast) -> None:
    assert round(lora.footprint.parts["transformer"] / 1e9, 1) == 11.9
    assert (len(lora.footprint.blocks), lora.footprint.trained) == (57, 26_148_864)
    weights = [(row.stage, row.offload, round(row.need.weights / GIB, 2)) for row in lora.rows]
    assert weights == [
        (0, False, 22.26), (1, False, 22.27), (2, False, 22.27), (3, False, 2.79),
        (1, True, 22.26), (2, True, 22.26), (3, True, 0.0),
    ]  # fmt: skip
    assert lora.rows[-1].need.host > 22.26 / 8 * GIB
    assert lora.plan is not None
    # A LoRA run that fits is not sharded: that would only slow it.
    assert (lora.workers, lora.plan.stage, lora.plan.micro_batch, lora.plan.accumulation) == (8, 0, 1, 8)
    # 22.2 by a CPU's autocast; CUDA's keeps the layer norms' inputs in fp32.
    assert 26 < lora.footprint.activations(1, checkpointing=False) / GIB < 28
    assert 1 < lora.footprint.activations(1, checkpointing=True) / GIB < 3


def test_full_tuning_is_sharded_and_says_what_would_make_it_fit(flux: Path) -> None:
    values = recipe(flux, tuner={"type": "full"})
    values["train"] |= {"activation_checkpointing": True}
    found = forecast(parse_recipe(values), "8x8xH100")
    assert found.plan is not None
    assert (found.workers, found.plan.stage, found.plan.micro_batch) == (64, 2, 1)
    values["train"] |= {"activation_checkpointing": False}
    found = forecast(parse_recipe(values), "1x48GiB")
    assert found.plan is None
    assert found.problem.startswith("train.zero.stage: auto: at stage 0 and micro-batch 1 each of 1 workers needs ")
    assert found.problem.endswith(
        "take train.activation_checkpointing: true, train.zero.offload: cpu, more workers or a smaller model"
    )
    values["train"] |= {"zero": {"offload": "cpu"}, "activation_checkpointing": True}
    found = forecast(parse_recipe(values), "1x48GiB")
    assert found.plan is not None
    assert (found.plan.stage, found.plan.micro_batch) == (3, 16)
    assert found.rows[-1].need.host > 11.9e9 * 16 > found.rows[-1].need.total


def test_what_goes_to_a_disk_is_in_a_column_of_its_own(lora: Forecast, flux: Path) -> None:
    asked = parse_recipe(recipe(flux, train={"zero": {"offload": "nvme"}}))
    sizes = need(lora.footprint, asked, stage=3, workers=8, micro_batch=1, offload=True)
    text = render(replace(lora, rows=(Row(3, True, sizes, sizes.total),)), asked)
    header, line = (line.split() for line in text.splitlines() if line.startswith(("GiB ", "stage 3")))
    assert (header[-1], line[:4]) == ("disk", ["stage", "3,", "offload", "nvme"])
    assert (sizes.host, line[-1]) == (0, f"{lora.rows[-1].need.host / GIB:.2f}")


def test_the_command(flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    (tmp_path / "r.yaml").write_text(json.dumps(recipe(flux)))
    command = ["gtl", "plan", str(tmp_path / "r.yaml"), "--cluster", "8xH100"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"model    {flux} (flux, bf16): transformer 11.9 B parameters"
    assert lines[1] == "trained  26.1 M parameters by lora"
    assert lines[2] == "cluster  1 x 8 x H100, 79.2 GiB each, 71.3 GiB to fill; 8 workers"
    assert lines[3] == "auto     ZeRO stage 0, micro-batch 1, accumulation 8 for batches of 64"
    assert lines[7].split()[:5] == ["stage", "0", "22.26", "0.10", "0.19"]
    assert lines[-57].split() == ["1", "transformer_blocks.0", "340", "M", "786", "k"]
    small = {**recipe(flux), "model": {"source": "builtin:tiny"}, "data": {"source": "photos", "resolution": 64}}
    (tmp_path / "r.yaml").write_text(json.dumps(small))
    monkeypatch.setattr(sys, "argv", [*command, "--json"])
    with pytest.raises(SystemExit):
        main()
    assert json.loads(capsys.readouterr().out)["family"] == "sd"


@pytest.mark.parametrize(
    ("cluster", "batch_size", "said"),
    [
        ("8xH200", 60, "micro-batch 3, accumulation 3 for batches of 60, filled up with 12 repeats that do not count"),
        ("3xH200", 5, "micro-batch 2, accumulation 1 for batches of 5, filled up with 1 repeat that does not count"),
        ("1xH200", 4, "micro-batch 2, accumulation 2 for batches of 4"),
    ],
)
def test_batches_that_workers_cannot_share_evenly_are_filled_up(
    flux: Path, cluster: str, batch_size: int, said: str
) -> None:
    made = parse_recipe(recipe(flux, train={"batch_size": batch_size}))
    assert render(forecast(made, cluster), made).splitlines()[3] == f"auto     ZeRO stage 0, {said}"


def test_a_forecast_for_programs(lora: Forecast) -> None:
    values = json.loads(json.dumps(as_json(lora)))
    assert values["plan"] == {"stage": 0, "micro_batch": 1, "accumulation": 8}
    row = values["rows"][0]["need"]
    assert row["total"] == sum(value for name, value in row.items() if name not in ("total", "host"))


def test_clusters() -> None:
    assert parse_cluster("8x8xH100") == Hardware(8, 8, "H100", 79.2 * GIB)
    assert parse_cluster("4xRTX 4090") == Hardware(1, 4, "RTX 4090", 23.5 * GIB)
    assert parse_cluster("2x4x48GiB") == Hardware(2, 4, "48GiB", 48 * GIB)
    assert parse_cluster("H200").workers == 1
    for wrong in ("8x8xTPU", "0xH100", "", "8", "8x8x8xH100", "x.xGiB", "fooGiB", "8xGiB", "8x1.2.3GiB", ".GiB",
                  "infGiB", "nanGiB", "0GiB", "-5GiB"):  # fmt: skip
        expected = f"^--cluster {re.escape(wrong)}: expected NODESxGPUSxKIND, such as 8x8xH100, where"
        with pytest.raises(UserError, match=expected):
            parse_cluster(wrong)


def test_more_workers_than_the_cluster_has(flux: Path) -> None:
    with pytest.raises(UserError, match=r"^train.workers: 9: --cluster 8xH100 has 8 GPUs$"):
        forecast(parse_recipe(recipe(flux, train={"workers": 9})), "8xH100")


def test_counts_have_three_digits() -> None:
    assert [count(n) for n in (0, 7, 999, 1234, 12_345_678, 999_500, 11_901_408_320)] == [
        "0", "7", "999", "1.23 k", "12.3 M", "1000 k", "11.9 B"
    ]  # fmt: skip


def test_of_a_model_in_a_bucket_no_weights_are_fetched(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    store = Store(f"{s3}/{tmp_path.name}")
    for file in (folder := make_flux(tmp_path / "flux")).rglob("*"):
        if file.is_file():
            store.upload(file, file.relative_to(folder).as_posix())
    configs = resolve(store.url(), weights=False)
    assert not list(configs.rglob("*.safetensors"))
    assert (configs / "transformer" / "config.json").is_file()
    whole = resolve(store.url())
    assert len(list(whole.rglob("*.safetensors"))) == 4
    assert resolve(store.url(), weights=False) == configs != whole
