"""`gtl train` on a real Ray cluster with real DeepSpeed workers, as a user runs it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gtl.adapters import Registry
from gtl.config import Recipe, parse_recipe
from gtl.config.load import dump_recipe
from gtl.report.chart import short
from gtl.types import UserError
from tests.tiny import make_flux, make_sd, write_pictures

pytestmark = pytest.mark.usefixtures("ray_cluster")
STEPS = 6
LONG = 60
"""Steps of the one run that another one is stopped and resumed beside."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and ten captioned pictures in two shapes, seven and three, so that no batch of four comes out even."""
    folder = tmp_path_factory.mktemp("train")
    make_sd(folder / "model")
    write_pictures(folder / "images", [(96, 64)] * 3 + [(64, 64)] * 7)
    return folder


PRIOR = {"prompt": "a photo of a bird", "images": 3, "steps": 2, "weight": 0.5}


def make_recipe(place: Path, prior: dict[str, Any] | None = PRIOR, **train: Any) -> Recipe:
    return parse_recipe(
        {
            "model": {"source": str(place / "model")},
            "objective": {"prior": prior},
            "tuner": {"type": "lora", "rank": 4, "alpha": 8, "targets": "attention+ff"},
            "data": {"source": str(place / "images"), "resolution": 64},
            "train": {"steps": STEPS, "batch_size": 4, "learning_rate": 1e-2, "workers": 2, **train},
            "evaluate": {"prompts": []},
            "storage": {name: str(place / name) for name in ("runs", "cache", "registry")},
        }
    )


def silent(phase: str, done: int, total: int, detail: str = "") -> None:
    """Show nothing."""


def losses(place: Path, name: str) -> list[float]:
    (file,) = (place / "runs" / name).glob("*/metrics.jsonl")
    return [json.loads(line)["loss"] for line in file.read_text().splitlines()]


Told = list[tuple[Any, ...]]


@pytest.fixture(scope="module")
def told_by_one() -> Told:
    """What the run on one worker tells."""
    return []


@pytest.fixture(scope="module")
def one_worker(place: Path, told_by_one: Told) -> list[float]:
    """Losses of a run on one worker, named one."""
    from gtl.train.launch import train

    train(make_recipe(place, workers=1), "one", progress=lambda *row: told_by_one.append(row))
    return losses(place, "one")


@pytest.fixture(scope="module")
def straight(place: Path) -> Recipe:
    """The recipe of a run named zero2, which nothing stopped."""
    from gtl.train.launch import train

    recipe = make_recipe(place, zero={"stage": 2}, steps=LONG, ema=0.9, checkpoints={"every": 1000})
    train(recipe, "zero2", progress=silent)
    return recipe


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_workers_learn_what_one_does_at_every_stage(
    place: Path, one_worker: list[float], straight: Recipe, stage: int
) -> None:
    from gtl.train.launch import train

    steps = LONG if stage == 2 else STEPS
    if stage != 2:
        train(make_recipe(place, zero={"stage": stage}), f"zero{stage}", progress=silent)
    assert (len(one_worker), len(losses(place, f"zero{stage}"))) == (STEPS, steps)
    np.testing.assert_allclose(losses(place, f"zero{stage}")[:STEPS], one_worker, rtol=1e-5)
    card = Registry(place / "registry").show(f"zero{stage}")
    assert card.dataset is not None and card.dataset.images == 10
    assert card.training is not None and card.training.steps == steps
    assert set(card.files) == {"adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors"}
    run = place / "runs" / f"zero{stage}" / card.version
    left = {"recipe.yaml", "metrics.jsonl", "result.json", "tensorboard", "checkpoints", "adapter", "report.html"}
    assert {path.name for path in run.iterdir()} >= left
    manifest = json.loads((run / "checkpoints" / f"{steps:08d}" / "manifest.json").read_text())
    assert (manifest["step"], manifest["stage"], manifest["workers"]) == (steps, stage, 2)


def distance(a: Image.Image, b: Image.Image) -> float:
    """Mean absolute difference in 1/255."""
    return float(np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).mean())


PROMPTS = ["a photo of a dog", "two unknown words", "a cat"]


@pytest.fixture(scope="module")
def shown(place: Path, photos: Path) -> tuple[Path, Told]:
    """A run on photographs that looks at what it learns and stops early: its folder, and what it told."""
    from gtl.train.launch import train

    values = make_recipe(place, zero={"stage": 3}, steps=40, learning_rate=5e-2, ema=0.5).model_dump(mode="json")
    values["data"] |= {"source": str(photos / "dog"), "validation": 0.4}
    values["tuner"] |= {"dropout": 0.2, "targets": "all-linear+conv"}
    values["train"]["early_stopping"] = {"patience": 2}
    values["evaluate"] = {"prompts": PROMPTS, "every": 2, "steps": 4, "guidance": 3.0, "seed": 5}
    told: Told = []
    published = train(parse_recipe(values), "shown", progress=lambda *row: told.append(row))
    return place / "runs" / "shown" / published.version, told


def test_a_run_shows_what_it_learns_and_stops_at_its_best(place: Path, shown: tuple[Path, Told]) -> None:
    from gtl.families import open_family
    from gtl.generate.images import generate
    from gtl.generate.request import Request
    from gtl.images import grid, read_recipe

    run, told = shown
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    looks = {int(row["step"]): row for row in rows if "val_loss" in row}
    assert list(looks) == [*range(0, int(rows[-1]["step"]) + 1, 2)]
    for row in looks.values():
        assert row["val_loss"] == pytest.approx(sum(row[f"val_loss_q{q}"] for q in (1, 2, 3, 4)) / 4)
    best = min((step for step in looks if step), key=lambda step: looks[step]["val_loss"])
    card = Registry(place / "registry").show("shown")
    assert card.training is not None
    assert (card.training.best_step, card.training.steps) == (best, best + 4)
    assert card.dataset is not None and card.dataset.images == 3
    assert card.training.steps < 40
    assert card.training.val_loss == looks[best]["val_loss"]
    assert ("look", 0, 0, f"step {best}  val_loss {short(looks[best]['val_loss'])}") in told
    assert {path.stem for path in (run / "samples").iterdir()} == {f"{step:08d}" for step in looks}
    requests = [Request(p, 64, 64, seed=5 + i, steps=4, guidance=3.0) for i, p in enumerate(PROMPTS)]
    family, folder = open_family(str(place / "model")), Registry(place / "registry").fetch("shown")
    for step, adapters in ((0, []), (best, [(folder, 1.0)])):
        drawn = dict(generate(family, requests, adapters))
        file = run / "samples" / f"{step:08d}.png"
        assert distance(Image.open(file), grid([drawn[i] for i in range(3)], 4)) < 1
        assert read_recipe(file) == {"prompts": PROMPTS, "seed": 5, "steps": step}
    assert distance(Image.open(run / "samples" / "00000000.png"), Image.open(file)) > 3


def test_plain_diffusers_draws_what_gtl_learned_from_photographs(
    place: Path, shown: tuple[Path, Told], tmp_path: Path
) -> None:
    import torch
    from diffusers import StableDiffusionPipeline

    from gtl.generate.command import run as draw

    prompt = "a photo of a dog"
    options = {"prompt": prompt, "seed": 3, "steps": 8, "guidance": 4.0, "registry": str(place / "registry")}
    ours = draw(out=tmp_path / "ours", adapters=["shown"], **options)[0]
    base = draw(out=tmp_path / "base", model=str(place / "model"), **options)[0]
    pipe = StableDiffusionPipeline.from_pretrained(place / "model", safety_checker=None)
    pipe.load_lora_weights(str(Registry(place / "registry").fetch("shown")))
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        prompt, num_inference_steps=8, guidance_scale=4.0, generator=torch.Generator().manual_seed(3)
    ).images[0]  # fmt: skip
    assert distance(Image.open(ours), theirs) < 1
    assert distance(Image.open(base), theirs) > 3


def test_class_images_are_drawn_once_and_learned_beside_the_subject(
    place: Path, one_worker: list[float], told_by_one: Told
) -> None:
    from gtl.train.launch import fill_cache

    told: Told = []
    again = fill_cache(make_recipe(place, workers=1), lambda *row: told.append(row))
    card = Registry(place / "registry").show("one")
    assert card.dataset is not None and card.dataset.images == 10
    assert card.dataset.fingerprint == again.fingerprint
    assert sum(entry.record.is_class_image for entry in again.entries) == PRIOR["images"]
    pictures = sorted((place / "cache").rglob("class_images/*/*.png"))
    assert [picture.name for picture in pictures] == ["00000.png", "00001.png", "00002.png"]
    assert [row[:3] for row in told_by_one].count(("class images", 3, 3)) >= 1
    assert {row[0] for row in told} == {"model"}


@pytest.mark.soak  # the same without Ray is in tests/engine/test_store_faults.py
def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(place: Path, small_disk: Path) -> None:
    from gtl.train.launch import train

    values = make_recipe(place, workers=1, steps=40, checkpoints={"every": 1, "keep": 40}).model_dump(mode="json")
    values["storage"]["runs"] = str(small_disk)
    values["tuner"]["rank"] = 16
    with pytest.raises(UserError, match=r"the disk is full") as caught:
        train(parse_recipe(values), "full", progress=silent)
    assert str(small_disk) in str(caught.value)
    kept = sorted(small_disk.glob("full/*/checkpoints/*/manifest.json"))
    assert kept
    for manifest in kept:
        for name, entry in json.loads(manifest.read_text())["files"].items():
            assert (manifest.parent / name).stat().st_size == entry["bytes"]


def start(place: Path, recipe: Recipe, *arguments: str) -> "subprocess.Popen[str]":
    """The command, on the session's cluster."""
    import ray

    file = place / "recipe.yaml"
    file.write_text(dump_recipe(recipe))
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    command = [sys.executable, "-c", "from gtl.cli import main; main()", "train", str(file), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_rows(place: Path, name: str, number: int, command: "subprocess.Popen[str]") -> None:
    """Until a run has made so many steps."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and command.poll() is None:
        files = (place / "runs" / name).glob("*/metrics.jsonl")
        if any(len(file.read_text().splitlines()) >= number for file in files):
            return
        time.sleep(0.05)


def stop(place: Path, recipe: Recipe, name: str, by: signal.Signals) -> dict[str, Any]:
    """Send a signal to the command after a few steps of a run: it saves and stops. The checkpoint's manifest."""
    command = start(place, recipe, "--name", name)
    wait_for_rows(place, name, 3, command)
    command.send_signal(by)
    _, err = command.communicate()
    assert command.returncode == 130, err
    assert err.splitlines()[-1].endswith("stopped and saved before its last step; --resume goes on")
    (manifest,) = (place / "runs" / name).glob("*/checkpoints/*/manifest.json")
    saved: dict[str, Any] = json.loads(manifest.read_text())
    return saved


def kill_a_worker() -> None:
    """SIGKILL one of the training processes of this machine's Ray."""
    (*_, pid) = (
        int(entry.name) for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and b"ray::" in read(entry / "cmdline") and b"TrainWorker" in read(entry / "cmdline")
    )  # fmt: skip
    os.kill(pid, signal.SIGKILL)


def read(file: Path) -> bytes:
    """Nothing of a process that is gone."""
    try:
        return file.read_bytes()
    except OSError:
        return b""


def test_ctrl_c_saves_and_resume_ends_in_the_same_bits_though_a_worker_is_killed(place: Path, straight: Recipe) -> None:
    saved = stop(place, straight, "stopped", signal.SIGINT)
    assert 3 <= saved["step"] < LONG
    resumed = start(place, straight, "--name", "stopped", "--resume")
    wait_for_rows(place, "stopped", saved["step"] + 5, resumed)
    kill_a_worker()
    out, err = resumed.communicate()
    assert resumed.returncode == 0, err
    assert out.splitlines()[-1].startswith("adapter stopped@")
    assert losses(place, "stopped") == losses(place, "zero2")
    training = Registry(place / "registry").show("stopped").training
    assert training is not None and training.final_loss == losses(place, "stopped")[-1]
    assert training.device_hours > saved["device_hours"] > 0
    files = [Registry(place / "registry").fetch(name) / "adapter_model.safetensors" for name in ("zero2", "stopped")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.soak
def test_sigterm_to_the_command_saves_and_stops(place: Path, straight: Recipe) -> None:
    assert 3 <= stop(place, straight, "ended", signal.SIGTERM)["step"] < LONG


def test_resume_refuses_another_recipe(place: Path) -> None:
    from gtl.storage import Store
    from gtl.train.resume import go_on

    recipe = make_recipe(place)
    runs = Store(place / "runs" / "changed")
    version = "20260101-000000-000-abcdef"
    runs.write(f"{version}/recipe.yaml", dump_recipe(recipe).encode())
    other = make_recipe(place, learning_rate=0.5, workers=1)
    said_of_both = r"other values of train\.learning_rate; put them back \(train\.workers may differ\), or start"
    with pytest.raises(UserError, match=said_of_both):
        go_on(runs, version, other)
    fewer, said = make_recipe(place, workers=1), []
    assert go_on(runs, version, fewer, lambda *told: said.append(told)) == fewer
    assert said == [("resume", 0, 0, "with other values of train.workers, which change nothing that is learned")]


def test_a_run_that_could_not_publish_publishes_on_resume(place: Path, one_worker: list[float]) -> None:
    from gtl.train.launch import train

    recipe, registry = make_recipe(place, workers=1), Registry(place / "registry")
    (run,) = (place / "runs" / "one").iterdir()
    card = registry.show("one")
    assert (run / "adapter.json").read_bytes() == card.to_json()
    registry.remove(f"one@{card.version}")
    with pytest.raises(UserError, match=r"^--resume: no unfinished run under "):
        train(recipe, "one", resume=True, progress=silent)
    phases = []
    for _ in range(2):  # the second time the registry has it, and only the run's copy of the card is missing
        (run / "adapter.json").unlink()
        resumed = train(recipe, "one", resume=True, progress=lambda phase, *_: phases.append(phase))
        assert (resumed.name, resumed.version) == ("one", card.version)
    assert set(phases) == {"model"}
    assert (run / "adapter.json").read_bytes() == registry.show("one").to_json()
    assert registry.show("one").files == card.files
    assert losses(place, "one") == one_worker


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("base", r"^model\.source: its files"),
        ("dataset", r"^data\.source: its images or captions, or the model's dtype"),
    ],
)
def test_resume_refuses_other_images_or_another_model(tmp_path: Path, kind: str, message: str) -> None:
    from gtl.train import checkpoint
    from gtl.train.job import Job
    from gtl.train.resume import check_unchanged

    recipe = make_recipe(tmp_path).model_dump(mode="json")
    job = Job(recipe, "changed", "v1", dataset="d" * 64, base="b" * 64, dtype="fp32")
    check_unchanged(job)
    checkpoint.save(job.run, "checkpoints/00000002", {}, {"step": 2, "dataset": job.dataset, "base": job.base})
    check_unchanged(job)
    with pytest.raises(UserError, match=message + r" changed since .*00000002 was saved \(.*, now 0{12}\); put"):
        check_unchanged(replace(job, **{kind: "0" * 64}))


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit status of a command, in this process."""
    from gtl.cli import main

    monkeypatch.setattr(sys, "argv", ["gtl", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def mistake(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that met one."""
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert out == "" and err.splitlines()[-1] == line
    return line.removeprefix("error: ")


def test_a_run_of_another_model_is_not_gone_on_with(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gtl.storage import Store
    from gtl.train import checkpoint

    recipe = make_recipe(place, workers=1)
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe))
    run_folder = Store(place / "runs" / "other" / "v1")
    run_folder.write("recipe.yaml", dump_recipe(recipe).encode())
    checkpoint.save(run_folder, "checkpoints/00000002", {}, {"step": 2, "dataset": "d" * 64, "base": "b" * 64})
    assert run(monkeypatch, "train", str(tmp_path / "r.yaml"), "--name", "other", "--resume") == 2
    assert mistake(capsys).startswith(
        f"model.source: its files changed since {run_folder.url('checkpoints/00000002')} was saved (base bbbbbbbbbbbb, "
    )


@pytest.mark.parametrize("part", ["vae", pytest.param("unet", marks=pytest.mark.soak)])
def test_a_truncated_file_of_the_model_is_one_line(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], part: str
) -> None:
    """The codec is read when images are encoded, the denoiser by the workers."""
    shutil.copytree(place / "model", tmp_path / "model")
    file = tmp_path / "model" / part / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    recipe = make_recipe(place, prior=None)
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"source": str(tmp_path / "model")})})
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe))
    assert run(monkeypatch, "train", str(tmp_path / "r.yaml"), "--name", "truncated") == 2
    assert mistake(capsys).startswith(f"{file}: damaged (")


@pytest.mark.soak
def test_a_damaged_checkpoint_is_one_line(
    place: Path, straight: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (done,) = (place / "runs" / "zero2").iterdir()
    mine = place / "runs" / "damaged" / done.name
    shutil.copytree(done, mine, ignore=shutil.ignore_patterns("result.json", "adapter.json"))
    (tmp_path / "r.yaml").write_text(dump_recipe(straight))
    file = mine / "checkpoints" / f"{LONG:08d}" / "denoiser.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert run(monkeypatch, "train", str(tmp_path / "r.yaml"), "--name", "damaged", "--resume") == 2
    said = mistake(capsys)
    assert said.startswith(f"{file}: ")
    assert said.endswith("remove this checkpoint to go on from the one before")


@pytest.mark.soak
def test_a_flow_matching_transformer_learns_at_stage_3_and_is_drawn(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from diffusers import FluxPipeline

    values = make_recipe(place, prior=None, zero={"stage": 3}, steps=3).model_dump(mode="json")
    values["model"]["source"] = str(make_flux(tmp_path / "flux"))
    (tmp_path / "r.yaml").write_text(dump_recipe(parse_recipe(values)))
    assert run(monkeypatch, "train", str(tmp_path / "r.yaml"), "--name", "flux") == 0
    adapter = capsys.readouterr().out.splitlines()[-1].removeprefix("adapter ")
    prompt, registry = "a photo of a dog", str(place / "registry")
    options = "--seed 3 --steps 4 --guidance 3.5 --width 64 --height 64 --registry".split()
    for out, which in (("ours", ["--adapter", adapter]), ("base", ["--model", str(tmp_path / "flux")])):
        command = ["generate", *which, "--prompt", prompt, *options, registry, "--out", str(tmp_path / out)]
        assert run(monkeypatch, *command) == 0
    ours, base = (Image.open(next((tmp_path / out).glob("*.png"))) for out in ("ours", "base"))
    pipe = FluxPipeline.from_pretrained(tmp_path / "flux")
    pipe.load_lora_weights(str(Registry(registry).fetch(adapter)))
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        prompt, num_inference_steps=4, guidance_scale=3.5, width=64, height=64,
        generator=torch.Generator().manual_seed(3),
    ).images[0]  # fmt: skip
    assert distance(ours, theirs) < 1
    assert distance(ours, base) > 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"source": "/nowhere"}}, "model.source: /nowhere"),
        ({"data": {"source": "/nowhere", "resolution": 64}}, "data.source: /nowhere"),
        ({"tuner": {"type": "lora", "targets": ["to_z"]}}, "tuner.targets: "),
        ({"train": {"workers": 2, "gpus_per_worker": 1}}, "train.workers: 2 workers with 1 GPU each need 2 GPUs"),
        ({"train": {"workers": 99}}, "train.workers: 99 workers with 1 CPUs each need 99 CPUs; the cluster has 3"),
        ({"storage": {"cache": "s3://no-such-bucket/cache"}}, "s3://no-such-bucket"),
        ({"storage": {"registry": "s3://no-such-bucket/registry"}}, "s3://no-such-bucket/registry/mistake"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_mistake_is_one_line(place: Path, change: dict[str, dict[str, Any]], message: str) -> None:
    from gtl.train.launch import train

    values = make_recipe(place, workers=1).model_dump(mode="json")
    recipe = parse_recipe({key: {**values[key], **change.get(key, {})} for key in values})
    with pytest.raises(UserError) as caught:
        train(recipe, "mistake", progress=silent)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tuner_that_does_not_fit_is_refused_before_anything_is_encoded(place: Path, tmp_path: Path) -> None:
    from gtl.train.launch import train

    values = make_recipe(place, prior=None, workers=1).model_dump(mode="json")
    values["storage"]["cache"], values["tuner"]["freeze_depth"] = str(tmp_path / "cache"), 99
    phases = []
    with pytest.raises(UserError, match=r"^tuner\.freeze_depth: 99"):
        train(parse_recipe(values), "mistake", progress=lambda phase, *_: phases.append(phase))
    assert set(phases) == {"model", "scan"}
