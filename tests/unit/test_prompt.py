"""Tuner prompt: what moves, how prompts with the word are read, and that diffusers reads the word as we do."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gtl.adapters import apply
from gtl.adapters.apply import kind_of, moved
from gtl.adapters.formats import LoraExport, write_lora
from gtl.adapters.residents import BASE, Adapters, Residents
from gtl.adapters.sharing import fits
from gtl.config import parse_recipe
from gtl.config.pairs import Needs
from gtl.config.tuners import LoraTuner, PromptTuner
from gtl.data.containers import Place
from gtl.data.prepare import check_word
from gtl.data.sources import Located, Scan
from gtl.families import open_family
from gtl.families.base import DiffusionFamily
from gtl.families.word_table import remove_words, table_of
from gtl.generate.engine import Engine
from gtl.generate.images import generate, load_parts
from gtl.generate.request import Request
from gtl.tuners import make_tuner
from gtl.types import Record, UserError
from tests.loras import random_lora
from tests.tiny import make_sd, make_sdxl

TOKEN = "<dog>"
CONFIG = PromptTuner(type="prompt", token=TOKEN, vectors=3, initializer="a dog")
PROMPTS = ["a photo of <dog>, sitting", "<dog>", "a cat and a <dog> beside a cat"]
MAKERS = {"sd": make_sd, "sdxl": make_sdxl}


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, DiffusionFamily]:
    return {name: open_family(str(make(tmp_path_factory.mktemp(name)))) for name, make in MAKERS.items()}


@pytest.fixture
def family(families: dict[str, DiffusionFamily]) -> DiffusionFamily:
    return families["sd"]


def encoders_of(family: DiffusionFamily) -> dict[str, nn.Module]:
    return {part: family.load(part) for part in family.encoders}


def taught(family: DiffusionFamily, config: PromptTuner = CONFIG) -> tuple[dict[str, nn.Module], dict[str, Tensor]]:
    """Encoders that know a word, which has moved away from where it started, and its vectors."""
    encoders = encoders_of(family)
    trainable = make_tuner(config, family).apply(encoders, seed=0)
    rng = torch.Generator().manual_seed(3)
    for parameter in trainable.values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=rng)
    return encoders, {name: parameter.detach().clone() for name, parameter in trainable.items()}


def exported(family: DiffusionFamily, folder: Path, config: PromptTuner = CONFIG) -> dict[str, nn.Module]:
    """Encoders that know a word, which is in the folder."""
    encoders, tensors = taught(family, config)
    make_tuner(config, family).export(tensors, folder)
    return encoders


def scanned(*captions: str) -> Scan:
    """An image of every caption, and a class image, which needs no word."""
    records = [Record(f"memory:{number}", "", (8, 8), (caption,)) for number, caption in enumerate(captions)]
    records.append(Record("memory:class", "", (8, 8), ("a photo of a dog",), is_class_image=True))
    return Scan([Located(record, Place("memory:", "", 0, 0, 0)) for record in records])


@pytest.mark.parametrize("name", MAKERS)
def test_only_the_vectors_move_and_start_from_the_initializer(families: dict[str, DiffusionFamily], name: str) -> None:
    family = families[name]
    encoders = encoders_of(family)
    before = {part: {key: value.clone() for key, value in encoders[part].state_dict().items()} for part in encoders}
    tables = {part: table_of(encoder).weight for part, encoder in encoders.items()}
    trainable = make_tuner(CONFIG, family).apply(encoders, seed=0)
    for part, encoder in encoders.items():
        (key,) = (key for key in trainable if key.startswith(f"{part}."))
        vectors, own = trainable[key], key.partition(".")[2]
        a, dog = family.tokenizers[part].convert_tokens_to_ids(["a</w>", "dog</w>"])
        assert torch.equal(vectors, tables[part][[a, dog, a]]) and vectors.dtype == torch.float32
        assert [each for each, value in encoder.named_parameters() if value.requires_grad] == [own]
        assert table_of(encoder).weight is tables[part]
    optimizer = torch.optim.AdamW(trainable.values(), lr=0.1)
    sum(value.square().sum() for value in encode(family, encoders, PROMPTS[0]).values()).backward()  # type: ignore[union-attr]
    for parameter in trainable.values():
        assert parameter.grad is not None and (parameter.grad.abs().sum(dim=1) > 0).all()
    optimizer.step()
    for part, encoder in encoders.items():
        after = dict(encoder.state_dict())
        assert [key for key in after if key not in before[part]] == [
            key.partition(".")[2] for key in trainable if key.startswith(f"{part}.")
        ]
        assert all(torch.equal(after[key], value) for key, value in before[part].items())


def encode(family: DiffusionFamily, encoders: dict[str, nn.Module], prompt: str) -> dict[str, Tensor]:
    return family.encode_prompts(encoders, [prompt])[0]


def test_a_word_is_its_vectors_in_order_wherever_it_stands(family: DiffusionFamily) -> None:
    encoders, _ = taught(family)
    size = int(family.config("text_encoder")["vocab_size"])  # type: ignore[attr-defined]
    word = [size, size + 1, size + 2]
    plain = family.tokenizers["text_encoder"]
    ids = {text: plain(text, add_special_tokens=False)["input_ids"] for text in ("a photo of", ", sitting", "a cat")}
    start, end = plain.bos_token_id, plain.eos_token_id
    found = [tokens["input_ids"].tolist() for tokens in family.reading(encoders).tokenize([*PROMPTS, "a cat"])]
    expected = [[*ids["a photo of"], *word, *ids[", sitting"]], word, None, ids["a cat"]]
    for read, middle in zip(found, expected, strict=True):
        assert len(read) == 77
        if middle is not None:
            assert read == [start, *middle, *[end] * (76 - len(middle))]
    assert [found[2].count(each) for each in word] == [1, 1, 1]
    assert family.reading(encoders) is family.reading(encoders)
    # Who asks with encoders that know no word reads the same text as ever.
    assert family.reading(encoders_of(family)) is family
    assert len(plain) == size and max(family.tokenize([TOKEN])[0]["input_ids"]) < size


def test_ids_begin_behind_a_table_that_is_larger_than_the_vocabulary(tmp_path: Path) -> None:
    folder = make_sd(tmp_path)
    config = folder / "text_encoder" / "config.json"
    family = open_family(str(folder))
    encoders, tensors = taught(family)
    narrow = encode(family, encoders, PROMPTS[0])
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "vocab_size": values["vocab_size"] + 40}))
    wide = open_family(str(folder))
    wider = encoders_of(family)
    wider["text_encoder"].resize_token_embeddings(values["vocab_size"] + 40)  # type: ignore[operator]
    make_tuner(CONFIG, family).export(tensors, tmp_path / "word")
    apply(wider, tmp_path / "word")
    assert int(wide.reading(wider).tokenize([TOKEN])[0]["input_ids"].max()) == values["vocab_size"] + 42
    assert torch.equal(encode(wide, wider, PROMPTS[0])["encoder_hidden_states"], narrow["encoder_hidden_states"])


@pytest.mark.parametrize("name", MAKERS)
def test_diffusers_reads_the_word_and_draws_the_same(
    families: dict[str, DiffusionFamily], tmp_path: Path, name: str
) -> None:
    from diffusers import DiffusionPipeline

    family = families[name]
    encoders = exported(family, tmp_path)
    pipe: Any = DiffusionPipeline.from_pretrained(family.folder)
    pipe.set_progress_bar_config(disable=True)
    if name == "sd":
        pipe.load_textual_inversion(tmp_path, weight_name="learned_embeds.safetensors")
    else:
        found = load_file(tmp_path / "learned_embeds.safetensors")
        assert set(found) == {"clip_l", "clip_g"}
        for key, end in (("clip_l", ""), ("clip_g", "_2")):
            encoder, tokenizer = getattr(pipe, f"text_encoder{end}"), getattr(pipe, f"tokenizer{end}")
            pipe.load_textual_inversion(found[key], token=TOKEN, text_encoder=encoder, tokenizer=tokenizer)
    for prompt in PROMPTS:
        theirs = pipe.encode_prompt(prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
        ours = encode(family, encoders, prompt)
        torch.testing.assert_close(ours["encoder_hidden_states"][None], theirs[0], rtol=0, atol=1e-6)
        if name == "sdxl":
            torch.testing.assert_close(ours["text_embeds"][None], theirs[2], rtol=0, atol=1e-6)

    def draw(embeds: dict[str, Tensor]) -> Any:
        given = {"prompt_embeds": embeds["encoder_hidden_states"][None]}
        if "text_embeds" in embeds:
            given["pooled_prompt_embeds"] = embeds["text_embeds"][None]
        generator = torch.Generator().manual_seed(0)
        return pipe(**given, num_inference_steps=2, guidance_scale=1.0, generator=generator, output_type="pt").images

    generator = torch.Generator().manual_seed(0)
    read = pipe(
        PROMPTS[0], num_inference_steps=2, guidance_scale=1.0, generator=generator, output_type="pt"
    ).images  # by its own tokenizers and encoders
    with torch.no_grad():
        torch.testing.assert_close(draw(encode(family, encoders, PROMPTS[0])), read, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MAKERS)
def test_files_give_back_what_was_learned(families: dict[str, DiffusionFamily], tmp_path: Path, name: str) -> None:
    family = families[name]
    encoders = exported(family, tmp_path / "a")
    exported(family, tmp_path / "b")
    assert (tmp_path / "a" / "learned_embeds.safetensors").read_bytes() == (
        tmp_path / "b" / "learned_embeds.safetensors"
    ).read_bytes()
    assert kind_of(tmp_path / "a") == "prompt"
    fresh = encoders_of(family)
    base = encode(family, fresh, "a cat")
    assert {key.partition(".")[0] for key in moved(fresh, tmp_path / "a")} == set(family.encoders)
    apply(fresh, tmp_path / "a")
    for prompt in (*PROMPTS, "a cat"):
        for key, value in encode(family, encoders, prompt).items():
            assert torch.equal(encode(family, fresh, prompt)[key], value)
    assert all(torch.equal(encode(family, fresh, "a cat")[key], value) for key, value in base.items())
    again = encoders_of(family)
    config = PromptTuner(type="prompt", token=TOKEN, vectors=3, init="dog")
    continued = make_tuner(config, family).apply(again, 0, tmp_path / "a")
    _, tensors = taught(family)
    assert all(torch.equal(continued[key], value) for key, value in tensors.items()) and len(continued) == len(tensors)
    for encoder in fresh.values():
        remove_words(encoder)
    assert family.reading(fresh) is family


def test_two_words_are_told_apart(family: DiffusionFamily, tmp_path: Path) -> None:
    cat = PromptTuner(type="prompt", token="<dog>gy", vectors=2, initializer="cat")
    alone = {TOKEN: exported(family, tmp_path / "dog"), cat.token: exported(family, tmp_path / "cat", cat)}
    both = encoders_of(family)
    apply(both, tmp_path / "dog", "dog")
    apply(both, tmp_path / "cat", "cat")
    for token, encoders in alone.items():
        ours, theirs = (encode(family, each, f"a {token} on the beach") for each in (both, encoders))
        assert torch.equal(ours["encoder_hidden_states"], theirs["encoder_hidden_states"])
    with pytest.raises(UserError, match="'<dog>' is a word of another adapter already"):
        apply(both, tmp_path / "dog", "again")


def test_what_does_not_fit_is_refused_in_a_line(families: dict[str, DiffusionFamily], tmp_path: Path) -> None:
    family = families["sd"]

    def mistake(init: Path | None = None, **changes: Any) -> str:
        values = {"type": "prompt", "token": TOKEN, "vectors": 3, **({} if init else {"initializer": "dog"}), **changes}
        config = PromptTuner(**values, **({"init": "old"} if init else {}))
        with pytest.raises(UserError) as caught:
            make_tuner(config, family).apply(encoders_of(family), 0, init)
        return str(caught.value)

    assert mistake(token="dog").startswith("tuner.token: 'dog': is a token of the model's own; take a word")
    assert mistake(vectors=1, initializer="a dog") == (
        "tuner.initializer: 'a dog': is 2 tokens to this model, and tuner.vectors is 1; take as many vectors, or fewer "
        "words"
    )
    exported(family, tmp_path / "dog")
    assert mistake(tmp_path / "dog", vectors=2) == (
        "tuner.init: old: it is '<dog>' of 3 vectors; tuner.token is '<dog>', and tuner.vectors 2"
    )
    lora = make_tuner(LoraTuner(rank=2), family)
    lora.export(lora.apply({"unet": family.load("unet")}, 0), tmp_path / "lora")
    assert mistake(tmp_path / "lora") == "tuner.init: old: it is a lora; prompt continues from a prompt"
    with pytest.raises(UserError, match=r"scale 0.5: the word '<dog>' has none; take 1"):
        apply(encoders_of(family), tmp_path / "dog", scale=0.5)
    with pytest.raises(UserError, match=r"'<dog>' is for text_encoder; the text encoders given are text_encoder, text"):
        apply(encoders_of(families["sdxl"]), tmp_path / "dog")
    assert fits(tmp_path / "dog") is not None
    (tmp_path / "dog" / "learned_word.json").unlink()
    with pytest.raises(UserError, match=r"learned_word.json: does not say which word is in learned_embeds.safetensors"):
        apply(encoders_of(family), tmp_path / "dog")


def test_one_that_draws_for_many_knows_the_word_for_those_who_ask(family: DiffusionFamily, tmp_path: Path) -> None:
    """Beside the base and a LoRA, and together with one: everyone's picture is the one that it gets alone."""
    exported(family, tmp_path / "dog")
    parts = load_parts(family, [], device="cpu", dtype=torch.float32)
    lora = write_random_lora(parts["unet"], tmp_path / "lora")
    exported(family, tmp_path / "both")
    write_random_lora(parts["unet"], tmp_path / "both")
    targets = {part: family.encoder_targets(parts[part], "all-linear") for part in family.encoders}
    targets["unet"] = family.lora_targets(parts["unet"], "all-linear")
    residents = Residents(parts, targets, slots=3, rank=4)
    engine = Engine(family, parts, max_batch=8, residents=residents)
    request = Request("a photo of <dog>", 64, 64, seed=3, steps=2, guidance=1.0)
    dog, with_lora = ((tmp_path / "dog", 1.0),), ((tmp_path / "dog", 1.0), (lora, 1.0))
    at_once, at_half = ((tmp_path / "both", 1.0),), ((tmp_path / "both", 0.5),)
    asked: list[Adapters] = [(), dog, ((lora, 1.0),), with_lora, (), at_once, at_half]
    seated_alone = (dog, with_lora, at_once, at_half)
    pictures = []
    for adapters in asked:
        loaded = residents.read(adapters) if adapters else None
        seat = BASE if loaded is None else residents.seat(adapters, loaded)
        assert seat is not None and (seat.company == (adapters if adapters in seated_alone else ()))
        engine.add(request, seat)
        while len(engine):
            for output in engine.step():
                pictures.extend(engine.decode([output]))
    for adapters, picture in zip(asked, pictures, strict=True):
        ((_, image),) = generate(family, [request], adapters)
        alone = torch.tensor(list(image.tobytes())).view(64, 64, 3).permute(2, 0, 1) / 255
        assert (picture - alone).abs().max() < 2e-4 + 0.5 / 255
    assert torch.equal(pictures[0], pictures[4]) and not torch.equal(pictures[0], pictures[1])
    torch.testing.assert_close(pictures[5], pictures[3])
    assert not torch.allclose(pictures[6], pictures[5]), "its LoRA has a scale, its word has none"
    with pytest.raises(UserError, match="'<dog>' is a word of another adapter already"):
        residents.read((*dog, *dog))
    with pytest.raises(UserError, match="scale 2: the word '<dog>' has none; take 1"):
        residents.read(((tmp_path / "dog", 2.0),))


def test_a_word_that_is_learned_with_a_lora_is_of_its_tuner(family: DiffusionFamily, tmp_path: Path) -> None:
    def recipe_of(**tuner: Any) -> Any:
        return parse_recipe({"model": {"source": "org/name"}, "data": {"source": "s3://b"}, "tuner": tuner})

    needs = recipe_of(token=TOKEN, initializer="dog").needs
    assert needs == Needs(images="latents", text="tokens", word=TOKEN, everywhere=False)
    check_word(scanned("a photo of <dog>", "a cat"), TOKEN, everywhere=False)
    with pytest.raises(UserError, match="tuner.token: '<dog>': 2 of 2 captions do not contain it"):
        check_word(scanned("a cat", "a dog"), TOKEN, everywhere=False)
    for tuner, message in (
        ({"token": TOKEN}, "initializer: missing; say in known words what it is, such as dog"),
        ({"token": TOKEN, "init": "old", "initializer": "dog"}, "gives the initial vectors, and so does init: old"),
        ({"vectors": 2}, "token: missing; vectors and initializer are of the word that it names"),
    ):
        with pytest.raises(UserError, match=message):
            recipe_of(**tuner)
    lora = make_tuner(LoraTuner(rank=2), family)
    lora.export(lora.apply({"unet": family.load("unet")}, 0), tmp_path)
    both = make_tuner(LoraTuner(rank=2, token=TOKEN, init="old"), family)
    with pytest.raises(UserError, match="^tuner.init: old: it is a lora; lora with a word continues from a pivotal$"):
        both.apply({"unet": family.load("unet"), **encoders_of(family)}, 0, tmp_path)


def write_random_lora(unet: nn.Module, folder: Path) -> Path:
    write_lora(random_lora(unet, "unet", seed=1, only="attn"), folder, config=LoraExport(rank=4, alpha=2.0))
    return folder


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"initializer": None}, "tuner: initializer: missing; say in known words what it is, such as dog"),
        ({"init": "old"}, "gives the initial vectors, and so does init: old; keep one"),
        ({"token": "a dog"}, "tuner.token: 'a dog'"),
        ({"token": "<Dog>"}, "tuner.token: '<Dog>'"),
        ({"vectors": 0}, "tuner.vectors: 0"),
    ],
)
def test_a_recipe_says_what_is_wrong_with_it(values: dict[str, Any], expected: str) -> None:
    tuner = {"type": "prompt", "token": TOKEN, "initializer": "dog", **values}
    with pytest.raises(UserError) as caught:
        parse_recipe({"model": {"source": "org/name"}, "data": {"source": "s3://b"}, "tuner": tuner})
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_captions_have_to_contain_the_word() -> None:
    tuner = {"type": "prompt", "token": TOKEN, "initializer": "dog"}
    recipe = parse_recipe({"model": {"source": "org/name"}, "data": {"source": "s3://b"}, "tuner": tuner})
    assert recipe.needs == Needs(images="latents", text="tokens", word=TOKEN)
    check_word(scanned("a photo of <dog>", "<dog>s"), TOKEN)
    check_word(scanned("a cat"), None)
    with pytest.raises(UserError) as caught:
        check_word(scanned("a photo of <dog>", "a cat"), TOKEN)
    assert str(caught.value) == (
        "tuner.token: '<dog>': 1 of 2 captions do not contain it, the first: 'a cat' of memory:1; write it into them, "
        "or set data.captions: template and data.caption_template: a photo of <dog>"
    )
