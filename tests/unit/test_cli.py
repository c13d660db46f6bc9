"""Commands as a user types them: what they print, and with which status they end."""

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from PIL import Image

from gtl.adapters import Card, Registry
from gtl.adapters.card import Base
from gtl.cli import app, main
from gtl.config import Recipe, load_recipe
from gtl.config.load import dump_recipe
from gtl.config.pairs import PAIRS
from tests.tiny import make_sd

RECIPE = "{model: {source: %s}, data: {source: %s, resolution: 64}}"


def commands() -> list[list[str]]:
    """Every command there is, as words."""
    found = []
    for name, one in typer.main.get_command(app).commands.items():
        found += [[name, inner] for inner in one.commands] if hasattr(one, "commands") else [[name]]
    return found


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a recipe, a picture, and a registry that holds dog@v1."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (64, 64), "red").save("pictures/a.png")
    Path("pictures/a.txt").write_text("a red square")
    Path("dog.yaml").write_text(RECIPE % (tmp_path / "model", tmp_path / "pictures"))
    Path("weights").mkdir()
    Path("weights/adapter_model.safetensors").write_bytes(b"weights")
    base = Base(source="some/model", fingerprint="f" * 64, family="sd")
    Registry("registry").publish("dog", "v1", Path("weights"), Card(name="dog", version="v1", base=base, tuner={}))
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit status of a command."""
    monkeypatch.setattr(sys, "argv", ["gtl", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def stop(*_: object, **__: object) -> None:
    """Of a training that is interrupted at once."""
    raise KeyboardInterrupt("stopped and saved")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train nowhere.yaml", "recipe nowhere.yaml: No such file or directory; expected a YAML file"),
        ("train dog.yaml --set tuner.rank=0", "tuner.rank: 0: should be greater than or equal to 1"),
        ("train dog.yaml --set tuner.rang=1", "tuner.rang: unknown key; did you mean tuner.rank?"),
        ("train dog.yaml --set train.zero.stage=4", "train.zero.stage: 4: "),
        ("train dog.yaml --set objective.type=autoencode", "objective.type: 'autoencode' does not go with tuner.type"),
        ("train dog.yaml --name Dog", "--name: 'Dog': a name starts with a-z or 0-9"),
        ("train dog.yaml --resume", "--resume: no unfinished run under {here}/runs/dog"),
        ("train dog.yaml", "model.source: {here}/model: no such folder"),
        ("cache dog.yaml", "model.source: {here}/model: no such folder"),
        ("tune study.yaml --resume --dry-run", "--resume: goes on with trials, and --dry-run runs none"),
        ("report cat", "run 'cat': no such run under {here}/runs, where there is nothing; see --runs"),
        ("report ./pictures", "run ./pictures: no recipe.yaml or study.yaml in it; give the folder of one"),
        ("data check nowhere", "data.source: nowhere: no such folder or file"),
        ("data check pictures --resolution 100", "data.resolution: 100: this model needs a multiple of 64"),
        ("generate --out drawn --prompt x --adapter cat", "adapter 'cat': not in the registry {here}/registry"),
        ("edit nowhere.png --out drawn --prompt x", "image nowhere.png: cannot be read: No such file or directory"),
        ("edit dog.yaml --out drawn --prompt x", "image dog.yaml: no image in a known format (AVIF, "),
        ("edit pictures/a.png --mask cat.png --out drawn --prompt x", "--mask cat.png: cannot be read: No such file"),
        ("edit pictures/a.png --out drawn --prompt x --adapter cat", "adapter 'cat': not in the registry"),
        ("adapters show dog@v2", "adapter 'dog@v2': dog has no such version or alias; it has: v1"),
        ("adapters fuse dog --name two", "fuse: 1 adapter; expected two or more, each NAME[@VERSION|@ALIAS][:WEIGHT]"),
        ("adapters fuse dog cat --name two --method add", "--method: 'add': expected one of linear, cat, svd, ties, "),
        ("adapters remove dog", "adapter 'dog': name the version to remove"),
        ("adapters import nowhere --model model --name dog", "model.source: 'model': not in the local cache"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    command: str, message: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *command.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {message.format(here=here)}")
    assert err.splitlines()[-1] == line


def test_a_zero_stage_above_what_the_pair_bears_is_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PAIRS, ("lora", "denoise"), replace(PAIRS["lora", "denoise"], max_zero_stage=1))
    for command in ("train", "plan", "cache"):
        assert run(monkeypatch, command, "dog.yaml", "--set", "train.zero.stage=2") == 2
        assert capsys.readouterr() == ("", "error: train.zero.stage: 2: lora with denoise bears at most 1\n")


def test_a_run_of_another_recipe_is_not_gone_on_with(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("runs/dog/v1").mkdir(parents=True)
    Path("runs/dog/v1/recipe.yaml").write_text(dump_recipe(load_recipe("dog.yaml", ["tuner.rank=3"])))
    assert run(monkeypatch, "train", "dog.yaml", "--resume") == 2
    assert capsys.readouterr() == (
        "", f"error: --resume: {here}/runs/dog/v1 was started with other values of tuner.rank; put them back, or start "
            "a new run without --resume\n",
    )  # fmt: skip


INTEGER = "Input should be a valid integer, unable to parse string as an integer"


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("nonsense", "No such command 'nonsense'; see gtl --help"),
        ("trian dog.yaml", "No such command 'trian'. Did you mean 'train'? see gtl --help"),
        ("--nonsense", "No such option: --nonsense; see gtl --help"),
        ("train", "Missing argument 'RECIPE'; see gtl train --help"),
        ("train dog.yaml --nonsense", "No such option: --nonsense; see gtl train --help"),
        ("train dog.yaml cat.yaml", "Got unexpected extra argument(s) (cat.yaml); see gtl train --help"),
        ("train dog.yaml --resume=yes", "Option '--resume' does not take a value; see --help of the command"),
        ("train dog.yaml --set", "Option '--set' requires an argument; see --help of the command"),
        ("generate --prompt x", "Missing option '--out'; see gtl generate --help"),
        ("generate --out o --count many", f"Invalid value for '--count': 'many': {INTEGER}; see gtl generate --help"),
        ("adapters shwo", "No such command 'shwo'. Did you mean 'show'? see gtl adapters --help"),
        ("bench train --workers x", f"Invalid value for '--workers': 'x': {INTEGER}; see gtl bench train --help"),
        ("jobs logs", "Missing argument 'JOB'; see gtl jobs logs --help"),
        ("submit", "Missing argument '-- COMMAND ...'; see gtl submit --help"),
        ("submit --follow --retries -1 -- train dog.yaml",
         "Invalid value for '--retries': '-1': Input should be greater than or equal to 0; see gtl submit --help"),
        ("submit -- train dog.yaml --nonsense", "No such option: --nonsense; see gtl train --help"),
    ],
)  # fmt: skip
def test_what_cannot_be_parsed_is_one_line_and_status_2(
    command: str, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *command.split()) == 2
    assert capsys.readouterr() == ("", f"error: {line}\n")


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_refuses_an_unknown_option_in_one_line(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *command, "--zzz") == 2
    assert capsys.readouterr() == ("", f"error: No such option: --zzz; see {' '.join(['gtl', *command])} --help\n")


def test_the_registry_in_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "adapters", "promote", "dog", "@prod") == 0
    assert run(monkeypatch, "adapters", "list") == 0
    assert capsys.readouterr().out == "@prod -> dog@v1\ndog@v1  lora  some/model @prod\n"
    assert run(monkeypatch, "adapters", "show", "dog@prod", "--json") == 0
    assert json.loads(capsys.readouterr().out)["aliases"] == ["prod"]
    assert run(monkeypatch, "adapters", "remove", "dog@v1") == 2
    assert run(monkeypatch, "adapters", "remove", "dog@v1", "--force") == 0
    monkeypatch.setenv("GTL_REGISTRY", "registry")
    assert run(monkeypatch, "adapters", "list", "--json") == 0
    assert capsys.readouterr().out == "removed dog@v1\n[]\n"


def test_what_was_done_to_the_registry_as_json(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "adapters", "promote", "dog", "prod", "--json") == 0
    assert run(monkeypatch, "adapters", "export", "dog", "--out", "copy", "--json") == 0
    assert run(monkeypatch, "adapters", "remove", "dog@v1", "--force", "--json") == 0
    promoted, exported, removed = map(json.loads, capsys.readouterr().out.splitlines())
    assert promoted == {"adapter": "dog@v1", "alias": "prod"}
    assert exported == {"adapter": "dog@v1", "out": "copy"}
    assert removed == {"removed": "dog@v1"}


def test_data_check_and_garbage(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "data", "check", "pictures", "--resolution", "64") == 0
    assert capsys.readouterr().out.splitlines()[:4] == [
        "pictures: 1 images", "", "captions: 1 distinct", "      1 x a red square",
    ]  # fmt: skip
    assert run(monkeypatch, "cache", "gc") == 0
    assert capsys.readouterr().out == "removed 0 files, 0.0 MiB\n"


def test_init_writes_a_recipe_and_what_to_type_next(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(make_sd(here / "tiny"))
    monkeypatch.setattr("gtl.data.draft.choose_model", lambda: model)
    assert run(monkeypatch, "init", "pictures") == 0
    out, err = capsys.readouterr()
    assert (out, err.splitlines()[-1]) == ("pictures.yaml\n", "next: gtl train pictures.yaml")
    assert load_recipe("pictures.yaml").model.source == model
    assert run(monkeypatch, "init", "pictures", "--model", "tiny", "--out", "My Photos.yaml") == 0
    out, err = capsys.readouterr()
    assert out == "My Photos.yaml\n"
    command = err.splitlines()[-1].removeprefix("next: ")
    assert shlex.split(command) == ["gtl", "train", "My Photos.yaml", "--name", "my-photos"]
    assert run(monkeypatch, "init", "pictures") == 2
    assert capsys.readouterr().err.startswith("error: --out pictures.yaml: is there already")

    trained: list[tuple[Recipe, str]] = []
    monkeypatch.setattr("gtl.train.launch.train", lambda recipe, name, **_: trained.append((recipe, name)) or stop())
    assert run(monkeypatch, *shlex.split(command)[1:]) == 130
    assert trained == [(load_recipe("My Photos.yaml"), "my-photos")]
    assert run(monkeypatch, "train", "My Photos.yaml") == 2
    assert len(trained) == 1
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .startswith("error: --name, left out, of My Photos.yaml: 'my photos': a name starts with a-z or 0-9")
    )


def test_a_study_is_called_as_its_file(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    space = "space: {train.learning_rate: {choice: [1e-3]}}"
    (here / "Rates.yaml").write_text(f"recipe: dog.yaml\n{space}\nmetric: kid\nscheduler: {{type: fifo}}\n")
    tried: list[str] = []
    monkeypatch.setattr("gtl.search.study.tune", lambda study, name, **_: tried.append(name) or stop())
    assert run(monkeypatch, "tune", "Rates.yaml") == 130
    assert tried == ["rates"]
    assert run(monkeypatch, "tune", "Rates.yaml", "--name", "a/b") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: --name: 'a/b': a name starts with a-z or 0-9")


def test_ctrl_c_says_what_it_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("gtl.train.launch.train", stop)
    assert run(monkeypatch, "train", "dog.yaml") == 130
    assert capsys.readouterr().err == "stopped and saved\n"
