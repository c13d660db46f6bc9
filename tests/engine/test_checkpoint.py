"""Checkpoint files: what is in them, and what is said of damaged ones."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from gtl import families
from gtl.adapters.card import LIBRARIES
from gtl.config import parse_recipe
from gtl.storage import Store
from gtl.train import checkpoint, course
from gtl.train.assemble import assemble
from gtl.train.checkpoint import Shapes, State, complete, latest, load, prune, save, step_key
from gtl.train.job import CHECKPOINTS, Job
from gtl.train.plan import TrainPlan
from gtl.train.saver import Saver
from gtl.train.worker import make_engines
from gtl.types import UserError
from tests.engine.group import Group
from tests.engine.runs import make_job
from tests.engine.toy import Toy, make_engine, make_train

SHAPES: dict[str, Shapes] = {"denoiser": {"a.weight": (4, 3), "b": (5,)}}
ATTENTION = re.compile(r"\.attn[12]\.to_(q|k|v|out\.0)\.weight$")
RANK = 4


def make_state(steps: int = 2) -> State:
    generator = torch.Generator().manual_seed(steps)
    kinds = ("weight", "exp_avg", "exp_avg_sq")
    return State(
        steps,
        {name: {kind: torch.randn(shape, generator=generator) for kind in kinds} for name, shape in
         SHAPES["denoiser"].items()},
    )  # fmt: skip


def put(store: Store, step: int, **manifest: object) -> str:
    key = step_key("checkpoints", step)
    save(store, key, {"denoiser": make_state(step)}, {"step": step, **manifest})
    return key


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    store = Store(tmp_path)
    key = put(store, 2, recipe="abc", world_size=2, stage=3)
    loaded = load(store, key, SHAPES)
    assert (loaded.step, loaded.steps("denoiser")) == (2, 2)
    expected = make_state(2).tensors
    tensors = dict(loaded.tensors("denoiser"))
    assert tensors.keys() == expected.keys()
    for name, kinds in expected.items():
        assert tensors[name].keys() == kinds.keys()
        for kind, value in kinds.items():
            assert torch.equal(tensors[name][kind], value)
    manifest = json.loads((tmp_path / key / "manifest.json").read_text())
    assert manifest.keys() == {"schema", "step", "recipe", "world_size", "stage", "versions", "players", "files"}
    assert manifest["schema"] == 1
    assert manifest["versions"].keys() == {"python", "gtl", *LIBRARIES}
    assert manifest["players"] == {
        "denoiser": {"steps": 2, "files": ["denoiser.safetensors"], "parameters": {"a.weight": [4, 3], "b": [5]}}
    }


def test_large_states_are_cut_into_files(tmp_path: Path) -> None:
    store = Store(tmp_path)
    key = step_key("", 7)
    save(store, key, {"denoiser": make_state()}, {"step": 7}, shard_bytes=100)
    files = sorted(path.name for path in (tmp_path / key).glob("*.safetensors"))
    assert files == [f"denoiser-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    assert set(load_file(tmp_path / key / files[0])) == {"weight/a.weight", "exp_avg/a.weight"}
    found = dict(load(store, key, SHAPES).tensors("denoiser"))
    assert found.keys() == make_state().tensors.keys()
    for name, kinds in found.items():
        assert kinds.keys() == make_state().tensors[name].keys()
        assert all(torch.equal(value, make_state().tensors[name][kind]) for kind, value in kinds.items())


def test_a_crash_before_the_manifest_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    before = put(store, 100)
    write = Store.write

    def crash(self: Store, key: str, data: bytes) -> None:
        if key.endswith("manifest.json"):
            raise KeyboardInterrupt
        write(self, key, data)

    monkeypatch.setattr(Store, "write", crash)
    with pytest.raises(KeyboardInterrupt):
        put(store, 200)
    monkeypatch.undo()
    assert (tmp_path / "checkpoints/00000200/denoiser.safetensors").exists()
    assert latest(store, "checkpoints") == before
    with pytest.raises(UserError, match="00000200/manifest.json: not found; a checkpoint without its manifest"):
        dict(load(store, step_key("checkpoints", 200), SHAPES).tensors("denoiser"))
    assert put(store, 200) == latest(store, "checkpoints")  # the run comes by again


def test_overwriting_takes_the_manifest_away_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    put(store, 100)
    monkeypatch.setattr(Store, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        put(store, 100)
    assert latest(store, "checkpoints") is None


def test_latest_goes_by_step(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert latest(store, "checkpoints") is None
    for step in (1000, 90, 200):
        put(store, step)
    assert latest(store, "checkpoints") == "checkpoints/00001000"


def test_prune_keeps_the_newest_finished(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for step in (1, 2, 4, 5):
        put(store, step)
    for unfinished in (3, 6):  # a crash, and one that is being written
        store.write(f"checkpoints/{unfinished:08d}/denoiser.safetensors", b"")
    prune(store, "checkpoints", 2)
    assert complete(store, "checkpoints") == ["checkpoints/00000004", "checkpoints/00000005"]
    assert store.folders("checkpoints") == ["00000004", "00000005", "00000006"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), r"denoiser.safetensors: \d+ bytes, its manifest says"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1] + b"\x55"), "denoiser.safetensors: changed since"),
        (lambda file: file.unlink(), "denoiser.safetensors: not found; remove this checkpoint"),
        (lambda file: (file.parent / "manifest.json").write_text("{"), "manifest.json: damaged; remove this"),
        (lambda file: (file.parent / "manifest.json").write_text('{"schema": 2}'), "schema 2; .* reads schema 1"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: object, message: str) -> None:
    key = put(Store(tmp_path), 2)
    damage(tmp_path / key / "denoiser.safetensors")  # type: ignore[operator]
    with pytest.raises(UserError, match=message) as error:
        dict(load(Store(tmp_path), key, SHAPES).tensors("denoiser"))
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"denoiser": {"a.weight": (4, 8), "b": (5,)}}, r"a.weight has shape \[4, 3\] there and shape \[4, 8\] in"),
        ({"denoiser": {"a.weight": (4, 3)}}, r"b has shape \[5\] there and no entry in"),
        ({"denoiser": {**SHAPES["denoiser"], "c": (1,)}}, r"c has no entry there and shape \[1\] in"),
        ({"generator": SHAPES["denoiser"]}, "of players denoiser; the recipe trains generator"),
    ],
)
def test_another_model_is_refused(tmp_path: Path, shapes: dict[str, Shapes], message: str) -> None:
    key = put(Store(tmp_path), 2)
    with pytest.raises(UserError, match=message):
        dict(load(Store(tmp_path), key, shapes).tensors("denoiser"))


def save_with_a_large_base(folder: str, stage: int) -> dict[str, tuple[int, ...]]:
    player = Toy()
    player.backbone = torch.nn.Linear(1000, 1000).requires_grad_(False)
    engine = make_engine(player, make_train(ema=0.9), stage)
    states = {"denoiser": engine.state()}
    if torch.distributed.get_rank() == 0:
        checkpoint.save(Store(folder), "checkpoint", states, {"step": 0})
    return dict(engine.shapes)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_only_what_is_trained_is_saved(duo: Group, tmp_path: Path, stage: int) -> None:
    shapes = duo.run(save_with_a_large_base, str(tmp_path), stage)[0]
    expected = {name: tuple(value.shape) for name, value in Toy().trained().items()}
    assert shapes == expected
    stored = load_file(tmp_path / "checkpoint/denoiser.safetensors")
    kinds = ("weight", "exp_avg", "exp_avg_sq", "ema")
    assert {label: tuple(value.shape) for label, value in stored.items()} == {
        f"{kind}/{name}": shape for name, shape in expected.items() for kind in kinds
    }
    assert {value.dtype for value in stored.values()} == {torch.float32}
    total = sum(path.stat().st_size for path in (tmp_path / "checkpoint").iterdir())
    assert total < 10_000  # the backbone alone has 4 MB


def save_a_lora(job: Job, stage: int) -> None:
    """What a run of that job saves, before its first step."""
    recipe = parse_recipe(job.recipe)
    trainee = assemble(recipe, job.dtype)
    plan = TrainPlan(steps=9, stage=stage, micro_batch=1, accumulation=1)
    engines = make_engines(trainee, recipe, plan, torch.device("cpu"))
    with Saver() as saver:
        course.save(engines, job, plan, 0, 0.0, CHECKPOINTS, 1, saver)


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_lora_checkpoint_has_the_size_of_its_adapter(
    duo: Group, tmp_path: Path, ema: float | None, stage: int
) -> None:
    """Weights, two moments and the average, four bytes each; of the 2.3 million frozen weights none."""
    job = make_job(tmp_path, ema=ema)
    duo.run(save_a_lora, job, stage)
    unet = Path(families.__file__).parent / "builtin" / "tiny" / "unet" / "diffusion_pytorch_model.safetensors"
    with safe_open(unet, framework="pt") as stored:
        shapes = {name: stored.get_slice(name).get_shape() for name in stored.keys()}  # noqa: SIM118 - not a mapping
    layers = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if ATTENTION.search(name)}
    numel = sum(RANK * (rows + columns) for rows, columns in layers.values())  # B, then A
    kinds = ["weight", "exp_avg", "exp_avg_sq"] + (["ema"] if ema else [])

    (folder,) = (Path(job.run.url()) / CHECKPOINTS).iterdir()
    assert {file.name for file in folder.iterdir()} == {"denoiser.safetensors", "manifest.json"}
    tensors = load_file(folder / "denoiser.safetensors")
    assert sum(tensor.nbytes for tensor in tensors.values()) == 4 * numel * len(kinds)
    assert len(tensors) == 2 * len(layers) * len(kinds)
    names = {label.partition("/")[2] for label in tensors}
    assert {name.rpartition(".lora_")[0].removeprefix("unet.") for name in names} == set(layers)
    beside = sum(file.stat().st_size for file in folder.iterdir()) - 4 * numel * len(kinds)
    assert beside < 1024 + 256 * len(tensors)  # a name and a place for each tensor
