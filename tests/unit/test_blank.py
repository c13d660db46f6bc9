"""The model that has learned nothing: plain libraries load it, and its words are tokens."""

import hashlib
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from gtl.builtin import pack
from gtl.data.scenes.sets import SceneSet
from gtl.data.scenes.words import vocabulary
from gtl.families import open_family
from gtl.families.blank import START, SUFFIX, TOKENS, learn_merges, write_blank
from gtl.families.files import write_once
from gtl.types import UserError

LARGEST = 8_000_000
"""Bytes of the model as it is shipped."""
TABLE = "embeddings.token_embedding.weight"
"""Of words."""


@pytest.fixture(scope="module")
def blank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("blank")
    write_blank(folder, vocabulary())
    return folder


def hashes(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_plain_diffusers_draws_with_it(blank: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(blank, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    (image,) = pipeline("a small red ring on a gray background", num_inference_steps=2).images
    assert image.size == (64, 64)


def test_the_family_reads_it(blank: Path) -> None:
    family = open_family(str(blank))
    assert (family.name, family.default_size, family.multiple) == ("sd", (64, 64), 16)
    assert family.latent_shape(64, 64) == (8, 16, 16)
    assert family.path.prediction == "v_prediction"
    assert float(family.path.snr(family.path.time(family.path.alphas_cumprod.new_ones(1)))) == 0.0
    sizes = {part: sum(p.numel() for p in family.load(part).parameters()) for part in family.classes}
    assert sizes == {"unet": 2_290_792, "vae": 655_547, "text_encoder": 290_784}


def test_every_caption_fits_and_its_words_are_tokens(blank: Path) -> None:
    tokenizer = open_family(str(blank)).tokenizers["text_encoder"]
    scenes = SceneSet(seed=7)
    for number in range(500):
        caption = scenes.scene(number)[1]
        tokens = tokenizer.tokenize(caption)
        assert "".join(tokens).replace(SUFFIX, "") == caption.lower().replace(" ", "")
        assert len(tokens) + 2 <= TOKENS
        assert all(token.endswith(SUFFIX) for token in tokens), caption
    for word in ("wug", "chalk", "neon"):  # which training never shows
        assert tokenizer.tokenize(word) == [f"{word}{SUFFIX}"]
    assert tokenizer.tokenize("sks") == ["s", "k", f"s{SUFFIX}"]
    assert tokenizer.decode(tokenizer("ein Äpfel").input_ids, skip_special_tokens=True).strip() == "ein äpfel"
    assert tokenizer("x").input_ids[0] == tokenizer.convert_tokens_to_ids(START)


def test_the_merges_are_learned_in_one_order() -> None:
    assert learn_merges(["aaa", "ab", "cab"]) == [
        ("a", f"b{SUFFIX}"), ("c", f"ab{SUFFIX}"), ("a", f"a{SUFFIX}"), ("a", f"aa{SUFFIX}"),
    ]  # fmt: skip
    assert learn_merges(["cab", "aaa", "ab", "ab"]) == learn_merges(["aaa", "ab", "cab"])


def test_the_same_seed_writes_the_same_files_and_another_one_other_weights(blank: Path, tmp_path: Path) -> None:
    write_blank(tmp_path / "same", vocabulary())
    write_blank(tmp_path / "other", vocabulary(), seed=1)
    first, same, other = hashes(blank), hashes(tmp_path / "same"), hashes(tmp_path / "other")
    assert first == same
    assert {name for name in first if first[name] != other[name]} == {
        "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    }  # fmt: skip


def test_it_is_shipped_in_half_precision_and_small(blank: Path, tmp_path: Path) -> None:
    pack(blank, tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < LARGEST
    family, whole = open_family(str(tmp_path)), open_family(str(blank))
    for part in family.classes:
        stored, expected = family.load(part).state_dict(), whole.load(part).state_dict()
        assert {str(value.dtype) for value in stored.values()} == {"torch.float16"}
        changed = {name for name, value in stored.items() if not value.equal(expected[name].half())}
        assert changed == ({TABLE} if part == "text_encoder" else set())


def test_words_that_were_not_met_are_as_large_as_those_that_were(blank: Path, tmp_path: Path) -> None:
    pack(blank, tmp_path)
    family, whole = open_family(str(tmp_path)), open_family(str(blank))
    ids = [tokens["input_ids"] for tokens in family.tokenize(["a large red circle", "a large red wug", "sks"])]
    assert [len(tokens.unique()) for tokens in ids] == [6, 6, 5]  # a new word is one token, of which both ends are none
    drawn, before = (f.load("text_encoder", torch.float32).state_dict()[TABLE] for f in (family, whole))
    met, unmet = ids[0].unique(), sorted({*ids[1].tolist(), *ids[2].tolist()} - set(ids[0].tolist()))
    assert torch.equal(drawn[met], before[met].half().float())
    assert not (drawn[unmet] == before[unmet]).any()
    # The blank model's are all of one size, so the drawn ones are that too.
    assert drawn[unmet].norm(dim=1).mean() == pytest.approx(float(before[met].norm(dim=1).mean()), rel=0.15)


def test_a_model_that_was_half_written_is_written_again(tmp_path: Path) -> None:
    calls = []

    def fail(folder: Path) -> None:
        (folder / "unet").mkdir()
        raise KeyboardInterrupt

    def write(folder: Path) -> None:
        assert not any(folder.iterdir())
        calls.append(folder)
        (folder / "model_index.json").write_text("{}")

    with pytest.raises(KeyboardInterrupt):
        write_once(tmp_path / "model", fail)
    assert not (tmp_path / "model").exists()
    assert write_once(tmp_path / "model", write) == write_once(tmp_path / "model", write) == tmp_path / "model"
    assert len(calls) == 1 and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("42")
    with pytest.raises(UserError, match=f"{tmp_path}: holds something that is not a model"):
        write_once(tmp_path, lambda folder: None)
    with pytest.raises(UserError, match="thesis.tex"):
        write_once(tmp_path / "thesis.tex" / "model", lambda folder: None)
    assert (tmp_path / "thesis.tex").read_text() == "42"
