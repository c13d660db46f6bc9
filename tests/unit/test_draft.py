"""`gtl init`: what it sees in a folder, and that the recipe it writes is one."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from gtl.config import load_recipe
from gtl.config.names import check_name
from gtl.data.draft import Draft, choose_model, write_draft
from gtl.types import UserError
from tests.tiny import make_sd


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    make_sd(folder)
    return str(folder)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def picture(file: str, number: int = 0, size: tuple[int, int] = (64, 64)) -> None:
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (number, 99, 30)).save(file)


def test_a_subject_without_captions_gets_a_template(
    here: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    for i in range(5):
        picture(f"My Dog/{i}.png", i)
    draft = write_draft("My Dog", model)
    assert (draft.file, draft.name, draft.prompt) == (Path("my-dog.yaml"), "my-dog", "a photo of sks My Dog")
    recipe = load_recipe(draft.file)
    assert (recipe.data.captions, recipe.data.caption_template) == ("auto", "a photo of sks {folder}")
    assert recipe.data.source == str(here / "My Dog")
    assert (recipe.data.resolution, recipe.data.buckets, recipe.data.validation) == (64, False, 0.0)
    assert recipe.train.steps == 400
    assert recipe.objective.caption_dropout == 0.0  # type: ignore[union-attr]
    assert "gtl train my-dog.yaml" in draft.file.read_text()
    monkeypatch.setenv("GTL_RUNS", str(here / "elsewhere"))
    assert load_recipe(draft.file).storage.runs == str(here / "elsewhere"), "it names no store itself"


def test_captions_shapes_and_many_images(here: Path, model: str) -> None:
    for i in range(48):
        picture(f"art/{i:02}.png", i, (128, 64) if i % 2 else (64, 64))
        Path(f"art/{i:02}.txt").write_text(f"a painting, number {i}")
    recipe = load_recipe(write_draft("art/", model, Path("paintings.yaml")).file)
    assert recipe.data.caption_template is None
    assert (recipe.data.buckets, recipe.data.validation, recipe.train.steps) == (True, 0.05, 1200)
    assert recipe.objective.caption_dropout == 0.1  # type: ignore[union-attr]


def test_folders_of_classes_are_their_own_captions(here: Path, model: str) -> None:
    for name in ("cat", "dog"):
        picture(f"pets/{name}/0.png", len(name))
    picture("pets/dog/small.png", 7, (16, 16))
    draft = write_draft("pets", model)
    assert (load_recipe(draft.file).data.caption_template, draft.prompt) == (None, "cat")
    assert "1 images are smaller and are enlarged" in draft.file.read_text()


@pytest.mark.parametrize("folder", ["a: b", "it's", "- x", "#1", "ünï", '"q"'])
def test_any_name_of_a_folder_is_quoted(folder: str, here: Path, model: str) -> None:
    picture(f"{folder}/0.png")
    assert load_recipe(write_draft(folder, model, Path("r.yaml")).file).data.source == str(here / folder)


def printed(draft: Draft) -> list[list[str]]:
    """The commands at the head of a recipe, as a shell reads them."""
    return [shlex.split(line) for line in re.findall("^#   (gtl .*)$", draft.file.read_text(), re.M)]


@pytest.mark.parametrize("caption", ["ein Käfer für 5 $HOME", "it's a \"dog\" \\ `id`", "犬 🐕", "a dog"])
def test_what_it_prints_can_be_pasted(caption: str, here: Path, model: str) -> None:
    picture("dog/0.png")
    Path("dog/0.txt").write_text(caption, encoding="utf-8")
    draft = write_draft("dog", model)
    assert printed(draft) == [
        ["gtl", "train", "dog.yaml"],
        ["gtl", "generate", "--adapter", "dog", "--prompt", caption, "--out", "pictures"],
    ]
    assert caption.isascii() or caption in draft.file.read_text(encoding="utf-8")  # not \u00e4


def test_a_caption_of_several_lines_stays_in_its_comment(here: Path, model: str) -> None:
    picture("dog/0.png")
    Path("dog/metadata.jsonl").write_text(r'{"file_name": "0.png", "text": "a dog\nmodel: \u2028 \u0007 evil"}')
    assert printed(write_draft("dog", model))[1][5] == "a dog model: evil"


@pytest.mark.parametrize(
    ("out", "name"), [("My Photos.yaml", "my-photos"), ("-$x.yaml", "x"), ("ÄÖ.yaml", "images"), ("Dog_.yaml", None)]
)
def test_a_file_whose_name_is_no_adapters_gets_one(out: str, name: str | None, here: Path, model: str) -> None:
    picture("dog/0.png")
    draft = write_draft("dog", model, Path(f"./{out}"))
    assert draft.name == check_name(name or "dog_")
    assert shlex.split(draft.command) == ["gtl", "train", out, *(["--name", name] if name else [])]
    assert printed(draft)[0] == shlex.split(draft.command)
    assert f"runs/{draft.name}/VERSION" in draft.file.read_text()


def test_this_folder_has_a_name(here: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    picture("Red Fox/old/0.png")
    monkeypatch.chdir("Red Fox")
    draft = write_draft(".", model)
    assert (draft.file, draft.prompt) == (Path("red-fox.yaml"), "a photo of sks Red Fox")
    assert load_recipe(draft.file).data.source == str(here / "Red Fox")
    monkeypatch.chdir("old")
    assert write_draft("..", model).name == "red-fox"


@pytest.mark.parametrize(
    ("has_gpu", "model"), [(False, "builtin:tiny"), (True, "stable-diffusion-v1-5/stable-diffusion-v1-5")]
)
def test_the_model_suits_the_machine(has_gpu: bool, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_gpu)
    assert choose_model() == model


def test_a_model_is_chosen_where_none_is_named(here: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gtl.data.draft.LAPTOP_MODEL", model)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    picture("dog/0.png")
    assert load_recipe(write_draft("dog").file).model.source == model


def test_mistakes_write_nothing(here: Path, model: str) -> None:
    picture("dog/0.png")
    Path("broken").mkdir()
    Path("broken/0.png").write_text("no image")
    Path("kept.yaml").write_text("mine")
    for folder, source, out, message in (
        ("dog", model, "kept.yaml", "--out kept.yaml: is there already"),
        ("dog", model, "no/where.yaml", "--out no/where.yaml: cannot be written: No such file"),
        ("dog", "no/such/model", None, "model.source: "),
        ("broken", model, None, "data.source: broken: none of the images there can be read"),
        ("nowhere", model, None, "data.source: nowhere: no such folder"),
    ):
        with pytest.raises(UserError) as refused:
            write_draft(folder, source, out and Path(out))
        assert str(refused.value).startswith(message)
    assert sorted(here.glob("*.yaml")) == [here / "kept.yaml"]
    assert Path("kept.yaml").read_text() == "mine"
