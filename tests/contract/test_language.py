"""Language models of transformers: what they are asked and answer, and what is refused."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gtl.backbones.language import check_language, open_language
from gtl.types import UserError
from tests.language import make_language
from tests.tiny import make_vision

REQUEST = "Write other captions. Each has the words 'a ring' in it."


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_language(tmp_path_factory.mktemp("plain"), "\n2.", " a ring in the snow")


def test_a_model_goes_on_behind_what_was_begun(plain: Path) -> None:
    language = open_language(str(plain))
    before = torch.get_rng_state()
    found = language.answers(REQUEST, "1. a large ring\n2.", 3)
    assert found == [" a ring in the snow"] * 3
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_that_converses_is_asked_in_its_own_form(tmp_path: Path) -> None:
    """It knows the answer behind its name alone, which its template puts there."""
    folder = make_language(tmp_path / "chat", "assistant\n1.", " a ring at night", chat=True)
    assert open_language(str(folder)).answers(REQUEST, "1.", 2) == [" a ring at night"] * 2


def test_words_are_sampled_as_the_models_own_settings_say(plain: Path, tmp_path: Path) -> None:
    """The same seed gives the same words, another one others: at a temperature of 2, which the files name."""
    folder = copy(plain, tmp_path)
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "temperature": 2.0}))
    language = open_language(str(folder))
    first, again, other = (language.answers(REQUEST, "\n2.", 1, seed) for seed in (1, 1, 2))
    assert first == again != other


def copy(folder: Path, out: Path) -> Path:
    for file in folder.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    return out


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:1000])


def without_a_weight(file: Path) -> None:
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(("name", "damage", "said"), [
    ("model.safetensors", cut, "not usable as a language model of transformers, with its tokenizer: "),
    ("model.safetensors", without_a_weight, "1 of the model's weights are missing, the first is model.norm.weight$"),
    ("config.json", lambda file: file.write_text("{"), "not usable as a language model of transformers"),
    ("tokenizer.json", Path.unlink, "not usable as a language model of transformers"),
])  # fmt: skip
def test_damaged_files_are_one_line(
    plain: Path, tmp_path: Path, name: str, damage: Callable[[Path], None], said: str
) -> None:
    damage(copy(plain, tmp_path) / name)
    with pytest.raises(UserError, match=f"^{tmp_path}: {said}"):
        open_language(str(tmp_path))


def set_(key: str, value: object) -> Callable[[Path], None]:
    return lambda file: file.write_text(json.dumps({**json.loads(file.read_text()), key: value})) and None


def spoilt(file: Path) -> None:
    tensors = load_file(file)
    save_file({name: torch.full_like(value, math.nan) for name, value in tensors.items()}, file, {"format": "pt"})


@pytest.mark.parametrize(("name", "damage", "said"), [
    ("generation_config.json", set_("temperature", 0.0), "`temperature`"),
    ("tokenizer_config.json", set_("chat_template", "{% for"), "unexpected 'end of template'"),
    ("model.safetensors", spoilt, "probability tensor contains either `inf`, `nan`"),
])  # fmt: skip
def test_what_cannot_answer_is_one_line(
    plain: Path, tmp_path: Path, name: str, damage: Callable[[Path], None], said: str
) -> None:
    damage(copy(plain, tmp_path) / name)
    with pytest.raises(UserError, match=f"^{tmp_path}: cannot answer: {said}"):
        open_language(str(tmp_path)).answers(REQUEST, "1.", 2)


def test_beams_of_a_models_settings_do_not_count(plain: Path, tmp_path: Path) -> None:
    set_("num_beams", 2)(copy(plain, tmp_path) / "generation_config.json")
    assert open_language(str(tmp_path)).answers(REQUEST, "\n2.", 2) == [" a ring in the snow"] * 2


@pytest.mark.parametrize(("spec", "said"), [
    ("./nowhere", "./nowhere: no such folder"), ("", "'': no such folder"), ("~nobody/x", "~nobody/x: no such folder"),
    (f"/{300 * 'a'}", f"/{300 * 'a'}: no such folder"), (300 * "a", f"{300 * 'a'}: neither a folder here nor"),
    ("{empty}", "{empty}: not usable as a language model"),
])  # fmt: skip
def test_what_is_not_there_is_known_at_once(tmp_path: Path, spec: str, said: str) -> None:
    given, expected = (text.replace("{empty}", str(tmp_path)) for text in (spec, said))
    with pytest.raises(UserError, match=f"^{re.escape(expected)}"):
        check_language(given)


def test_what_does_not_write_is_refused(tmp_path: Path, plain: Path) -> None:
    copy(make_vision(tmp_path / "vit", "vit"), copy(plain, tmp_path))  # beside a tokenizer, as CLIP's is
    with pytest.raises(UserError, match=f"^{tmp_path}: a vit, which does not write; expected a folder or hub id of a"):
        check_language(str(tmp_path))
    with pytest.raises(UserError, match="^nobody/nothing: neither a folder here nor, in the cache or on the hub, a"):
        open_language("nobody/nothing")
    language = open_language(str(plain))
    assert not language.reads(" ring" * 1000, "1.") and language.reads("ring", "1.")
    with pytest.raises(UserError, match=f"^{plain}: reads too few tokens for what it is asked$"):
        language.answers(" ring" * 1000, "1.", 1)


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    """Of a model that never ends: lines of five words, for as long as it is let."""
    folder = make_language(tmp_path / "endless", "\n2.", " a ring in the snow\n2.", ends=False)
    (text,) = open_language(str(folder)).answers(REQUEST, "\n2.", 1)
    lines = text.split("\n2.")
    assert len(lines) > 5 and set(lines) == {" a ring in the snow"}
