"""The recipe: what it reads, what it writes back, and what it says about mistakes."""

import copy
import re
import uuid
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from gtl.config import Recipe, load_recipe, parse_recipe
from gtl.config.load import dump_recipe, set_key
from gtl.config.metrics import METRICS
from gtl.config.names import Reference, check_name, new_version, parse_reference
from gtl.config.pairs import PAIRS, Needs, Pair, pair
from gtl.storage import Store
from gtl.types import UserError

BASE: dict[str, Any] = {"model": {"source": "org/name"}, "data": {"source": "s3://bucket/photos"}}

KNOWN = ", ".join(METRICS)


def recipe(*overrides: str) -> Recipe:
    values = copy.deepcopy(BASE)
    for override in overrides:
        set_key(values, override)
    return parse_recipe(values)


def mistake(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        recipe(*overrides)
    return str(caught.value)


def file_mistake(path: Path, text: str) -> str:
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    return str(caught.value)


def test_defaults_run_on_a_laptop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = recipe()
    assert made.storage.model_dump() == {place: f"{tmp_path}/{place}" for place in ("runs", "cache", "registry")}
    assert (made.tuner.type, made.tuner.rank, made.objective.type) == ("lora", 16, "denoise")
    assert (made.train.steps, made.train.epochs, made.train.workers, made.train.zero.stage) == (
        1000,
        None,
        "auto",
        "auto",
    )
    assert made.pair == Pair(Needs(images="latents", text="embeddings", live=()), max_zero_stage=3, frozen_base=True)


def test_what_is_written_reads_back_the_same(tmp_path: Path) -> None:
    made = recipe(
        "tuner.targets=[to_q, to_k]", "tuner.freeze_depth=0.5", "train.epochs=3", "train.optimizer.betas=[0.5, 0.75]",
        "objective.prior.prompt=ein Foto von Äpfeln", "data.source=[{source: a}, {source: 's3://b', weight: 0.5}]",
    )  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(dump_recipe(made))
    assert load_recipe(tmp_path / "recipe.yaml") == made
    assert "Äpfeln" in (tmp_path / "recipe.yaml").read_text()


def test_a_recipe_is_frozen_at_every_level() -> None:
    made = recipe()
    for section, name in ((made, "train"), (made.train, "steps"), (made.train.zero, "stage")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, name, 1)


def test_paths_become_absolute_and_urls_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    made = recipe("data.source=photos/../dog", "storage.runs=~/runs", "storage.cache=s3://b/c", "model.source=./sd")
    assert made.data.source == f"{tmp_path}/dog"
    assert (made.storage.runs, made.storage.cache) == ("/home/someone/runs", "s3://b/c")
    assert made.model.source == f"{tmp_path}/sd"
    listed = recipe("data.source=[{source: a}, {source: builtin:x, weight: 2}]").data.source
    assert [(s.source, s.weight) for s in listed if not isinstance(s, str)] == [(f"{tmp_path}/a", 1), ("builtin:x", 2)]


def test_a_hub_id_is_a_path_only_where_such_a_folder_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert recipe().model.source == "org/name"
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert recipe().model.source == f"{tmp_path}/org/name"


def test_the_environment_names_the_stores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GTL_RUNS", "s3://b/runs")
    monkeypatch.setenv("GTL_CACHE", "there")
    monkeypatch.setenv("GTL_REGISTRY", "/elsewhere")
    made = recipe("storage.registry=/mine").storage
    assert (made.runs, made.cache, made.registry) == ("s3://b/runs", f"{tmp_path}/there", "/mine")


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.steps=7", "train.steps", 7),
        ("train.learning_rate=1e-4", "train.learning_rate", 1e-4),  # YAML 1.1 reads this one as text
        ("tuner.targets=[to_q, to_k]", "tuner.targets", ["to_q", "to_k"]),
        ("tuner.targets=all-linear", "tuner.targets", "all-linear"),
        ("tuner.dora=true", "tuner.dora", True),
        ("tuner.freeze_depth=1", "tuner.freeze_depth", 1),
        ("tuner.freeze_depth=0.25", "tuner.freeze_depth", 0.25),
        ("train.max_grad_norm=null", "train.max_grad_norm", None),
        ("data.caption_template=a = b", "data.caption_template", "a = b"),
        ("objective.timesteps.shift=model", "objective.timesteps.shift", "model"),
        ("train.zero.stage=3", "train.zero.stage", 3),
    ],
)
def test_set_reads_values_as_yaml(override: str, key: str, value: object) -> None:
    found: Any = recipe(override)
    for part in key.split("."):
        found = getattr(found, part)
    assert (found, type(found)) == (value, type(value))


def test_set_changes_one_key_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("model: {source: org/name}\ndata: {source: s3://b}\ntrain: {steps: 5, batch_size: 2}\ntuner:\n")
    made = load_recipe(file, ["train.steps=9", "tuner.rank=3", "train.steps=10"])
    assert (made.train.steps, made.train.batch_size, made.tuner.rank) == (10, 2, 3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "--set train.steps: expected KEY=VALUE, for example train.steps=100"),
        ("=3", "--set =3: expected KEY=VALUE, for example train.steps=100"),
        ("train..steps=3", "--set train..steps=3: expected KEY=VALUE, for example train.steps=100"),
        ("a=2024-13-01", "--set a=2024-13-01: the value is not valid YAML: month must be in 1..12"),
        ("a=!!int x", "--set a=!!int x: the value is not valid YAML: invalid literal for int() with base 10: 'x'"),
        (f"a={'[' * 9999}", f"--set a={'[' * 9999}: the value is not valid YAML: nested too deeply"),
        ("model.source.x=1", "--set model.source.x=1: source is 'org/name', not a section with keys"),
        (
            "tuner.targets=[a",
            "--set tuner.targets=[a: the value is not valid YAML: line 1: expected ',' or ']', but got '<stream end>'",
        ),
    ],
)
def test_a_wrong_set(override: str, message: str) -> None:
    assert mistake(override) == message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trian.steps=3", "trian: unknown key; did you mean train?"),
        ("train.stepz=3", "train.stepz: unknown key; did you mean train.steps?"),
        ("train.zero.stag=3", "train.zero.stag: unknown key; did you mean train.zero.stage?"),
        ("objective.prior={prompt: a, wieght: 1}",
         "objective.prior.wieght: unknown key; did you mean objective.prior.weight?"),
        ("objective.timesteps.shfit=1",
         "objective.timesteps.shfit: unknown key; did you mean objective.timesteps.shift?"),
        ("data.source=[{source: a}, {source: b, wieght: 2}]",
         "data.source.1.wieght: unknown key; did you mean data.source.1.weight?"),
        ("data.source=[{sorce: a}]", "data.source.0.sorce: unknown key; did you mean data.source.0.source?"),
        ("tuner={type: full, freeze_depth: 3}", "tuner.freeze_depth: unknown key; known keys: type, train, init"),
        ("tuner={type: freeze, freeze_deph: 3}", "tuner.freeze_deph: unknown key; did you mean tuner.freeze_depth?"),
        ("tuner={type: freeze, freeze_depth: 3, train: [unet]}",
         "tuner.train: unknown key; known keys: type, freeze_depth, only, discriminator_depth, init"),
        ("tuner.rnk=3", "tuner.rnk: unknown key; did you mean tuner.rank?"),
        ("qqq=1", "qqq: unknown key; known keys: model, tuner, objective, data, train, evaluate, storage"),
        ("train.zero.qqq=1", "train.zero.qqq: unknown key; known keys: stage, offload, offload_folder, hpz"),
        ("objective={type: autoencode, klx: 1}", "objective.klx: unknown key; did you mean objective.kl?"),
        ("objective={type: autoencode, prior: null}", "objective.prior: unknown key; known keys: type, l1, l2, kl"),
        ("objective.l1=1", "objective.l1: unknown key; known keys: type, min_snr_gamma, caption_dropout, offset_noise, "
         "timesteps, prior"),
    ],
)  # fmt: skip
def test_an_unknown_key_gets_the_nearest_known_one(override: str, message: str) -> None:
    assert mistake(override) == message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data=", "data.source: missing; a recipe needs it"),
        ("objective.prior={}", "objective.prior.prompt: missing; a recipe needs it"),
        ("data.source=[{weight: 1}]", "data.source.0.source: missing; a recipe needs it"),
        ("train.optimizer.betas=[0.9]", "train.optimizer.betas.1: missing; a recipe needs it"),
        ("data.source=", "data.source: None: should be text or a list"),
        ("data.source=5", "data.source: 5: should be text or a list"),
        ("data.source=''", "data.source: '': should not be empty"),
        ("data.source=[]", "data.source: []: should have at least 1 in its list"),
        ("data.source=[a]", "data.source.0: 'a': should be a section with the keys source, weight, repeats"),
        ("data.source=[{source: a, weight: 0}]", "data.source.0.weight: 0: should be greater than 0"),
        ("data.caption_template=photo: x", "data.caption_template: {'photo': 'x'}: should be text"),
        ("data.resolution=4", "data.resolution: 4: should be greater than or equal to 8"),
        ("data.max_broken=2", "data.max_broken: 2: should be less than or equal to 1"),
        ("data.flip=5", "data.flip: 5: should be true or false"),
        ("model.dtype=fp16", "model.dtype: 'fp16': should be 'auto', 'fp32' or 'bf16'"),
        ("tuner.type=ful", "tuner.type: 'ful': should be 'lora', 'full', 'freeze' or 'prompt'"),
        ("tuner.init=Dog",
         "tuner.init: 'Dog': should be NAME, NAME@VERSION or NAME@ALIAS of a published adapter, without a scale"),
        ("tuner.init=dog:0.5",
         "tuner.init: 'dog:0.5': should be NAME, NAME@VERSION or NAME@ALIAS of a published adapter, without a scale"),
        ("tuner.init=5", "tuner.init: 5: should be text"),
        ("tuner.train=unet", "tuner.train: 'unet': should be a list"),
        ("tuner.train=[]", "tuner.train: []: should have at least 1 in its list"),
        ("tuner.train=[unet, unet]", "tuner.train: ['unet', 'unet']: should name each part once"),
        ("tuner={type: full, train: [5]}", "tuner.train.0: 5: should be text"),
        ("tuner={type: full, init: a@}",
         "tuner.init: 'a@': should be NAME, NAME@VERSION or NAME@ALIAS of a published adapter, without a scale"),
        ("tuner={init: dog, initialization: pissa}",
         "tuner: init: 'dog': gives the initial weights, and so does initialization: pissa; keep one"),
        ("tuner={initialization: random_b, rslora: true}",
         "tuner: rslora: True: is a scale for a random A; with initialization random_b the rank is in B already, so "
         "leave rslora out"),
        ("tuner={type: freeze}", "tuner.freeze_depth: missing; a recipe needs it"),
        ("tuner={type: freeze, freeze_depth: 1.0}",
         "tuner.freeze_depth: 1.0: should be a fraction in [0, 1), or a whole number of blocks, which is written 1"),
        ("tuner={type: freeze, freeze_depth: 1, only: [nrom]}",
         "tuner.only.0: 'nrom': should be 'norm', 'bias' or 'cross_attention'"),
        ("tuner={type: freeze, freeze_depth: 1, only: []}", "tuner.only: []: should have at least 1 in its list"),
        ("tuner={type: freeze, freeze_depth: 1, only: norm}", "tuner.only: 'norm': should be a list"),
        ("tuner.rank=0", "tuner.rank: 0: should be greater than or equal to 1"),
        ("tuner.rank=3.5", "tuner.rank: 3.5: should be a whole number"),
        ("tuner.rank=many", "tuner.rank: 'many': should be a whole number"),
        ("tuner.alpha=0", "tuner.alpha: 0: should be greater than 0 or 'auto'"),
        ("tuner.alpha=much", "tuner.alpha: 'much': should be a number or 'auto'"),
        ("tuner.dropout=1", "tuner.dropout: 1: should be less than 1"),
        ("tuner.targets=all",
         "tuner.targets: 'all': should be 'attention', 'attention+ff', 'all-linear' or 'all-linear+conv' or a list"),
        ("tuner.targets=[]",
         "tuner.targets: []: should be 'attention', 'attention+ff', 'all-linear' or 'all-linear+conv' "
         "or have at least 1 in its list"),
        ("tuner.freeze_depth=-1",
         "tuner.freeze_depth: -1: should be a whole number of blocks from 0, or a fraction in [0, 1)"),
        ("tuner.freeze_depth=-0.5",
         "tuner.freeze_depth: -0.5: should be a whole number of blocks from 0, or a fraction in [0, 1)"),
        ("tuner.freeze_depth=1.0",
         "tuner.freeze_depth: 1.0: should be a fraction in [0, 1), or a whole number of blocks, which is written 1"),
        ("tuner.freeze_depth=12.5",
         "tuner.freeze_depth: 12.5: should be a fraction in [0, 1), or a whole number of blocks, which is written 12"),
        ("tuner.freeze_depth=true", "tuner.freeze_depth: True: should not be true or false"),
        ("objective.type=autoencod",
         "objective.type: 'autoencod': should be 'denoise', 'autoencode', 'consistency', 'distill', 'instruct' or "
         "'adversarial'"),
        ("objective.type=",
         "objective.type: 'None': should be 'denoise', 'autoencode', 'consistency', 'distill', 'instruct' or "
         "'adversarial'"),
        ("objective={type: autoencode, kl: -1}", "objective.kl: -1: should be greater than or equal to 0"),
        ("objective={type: autoencode, l1: 0}",
         "objective: l1 and l2 are both 0; one of them has to be above, or nothing asks for the picture back"),
        ("objective.type=autoencode",
         "objective.type: 'autoencode' does not go with tuner.type 'lora'; allowed with it: consistency, denoise, "
         "instruct"),
        ("objective.min_snr_gamma=0", "objective.min_snr_gamma: 0: should be greater than 0"),
        ("objective.timesteps.shift=0", "objective.timesteps.shift: 0: should be greater than 0 or 'model'"),
        ("train.zero=2", "train.zero: 2: should be a section with the keys stage, offload, offload_folder, hpz"),
        ("train.zero={stage: 0, offload: cpu}",
         "train.zero.offload: cpu: moves what is sharded, and stage 0 shards nothing; take 1 to 3"),
        ("train={zero: {offload: cpu}, optimizer: {type: adamw_8bit}}",
         "train.zero.offload: cpu: adamw_8bit steps on a GPU only; take adamw"),
        ("train.zero={stage: 0, offload: nvme}",
         "train.zero.offload: nvme: moves what is sharded, and stage 0 shards nothing; take 1 to 3"),
        ("train={zero: {offload: nvme}, optimizer: {type: adamw_8bit}}",
         "train.zero.offload: nvme: adamw_8bit steps on a GPU only; take adamw"),
        ("train.zero={stage: 3, offload: nvme, hpz: 2}",
         "train.zero.offload: nvme: train.zero.hpz: 2 keeps the weights a second time in memory; take one of the two"),
        ("train.zero.offload_folder=scratch",
         "train.zero.offload_folder: 'scratch': should be an absolute path, since workers have other working folders"),
        ("train.zero.hpz=2", "train.zero.hpz: 2: it is about weights in shares; set train.zero.stage: 3"),
        ("train.checkpoints=5", "train.checkpoints: 5: should be a section with the keys every, keep, best"),
        ("train.steps=0", "train.steps: 0: should be greater than or equal to 1"),
        ("train.steps=true", "train.steps: True: should not be true or false"),
        ("train.workers=yes", "train.workers: True: should not be true or false"),
        ("train.batch_size=0", "train.batch_size: 0: should be greater than or equal to 1"),
        ("train.micro_batch=0", "train.micro_batch: 0: should be greater than or equal to 1 or 'auto'"),
        ("train.workers=x", "train.workers: 'x': should be a whole number or 'auto'"),
        ("train.learning_rate=-1", "train.learning_rate: -1: should be greater than 0"),
        ("train.learning_rate=.inf", "train.learning_rate: inf: should be a finite number"),
        ("train.ema=1", "train.ema: 1: should be less than 1"),
        ("train.zero.stage=4", "train.zero.stage: 4: should be 'auto', 0, 1, 2 or 3"),
        ("train.optimizer.betas=[0.9, 1.5]", "train.optimizer.betas.1: 1.5: should be less than 1"),
        ("train.optimizer.betas=0.9", "train.optimizer.betas: 0.9: should be a list"),
        ("data.validation=1", "data.validation: 1: should be less than 1"),
        ("data.validation=-0.1", "data.validation: -0.1: should be greater than or equal to 0"),
        ("objective={type: autoencode, l2: -1}", "objective.l2: -1: should be greater than or equal to 0"),
        ("train.micro_batch=[1]", "train.micro_batch: [1]: should be a whole number or 'auto'"),
        ("train.early_stopping=3",
         "train.early_stopping: 3: should be a section with the keys metric, patience, min_delta"),
        ("train.early_stopping.metric=fdi", f"train.early_stopping.metric: 'fdi': no such metric; there are {KNOWN}"),
        ("train.early_stopping={metric: fid}", "evaluate.beside.samples: 64: fid needs at least 100"),
        ("train.checkpoints.best=val_loss",
         "train.checkpoints.best: there is nothing to judge by; set data.validation, such as 0.05"),
        ("train.checkpoints.best=clip_score",
         "evaluate.clip: null: clip_score needs a CLIP model; give its folder or hub id"),
        ("evaluate.beside.metrics=[memorization]",
         "evaluate.beside.metrics: memorization: set data.validation, such as 0.05"),
        ("evaluate={prompts: [], beside: {metrics: [kid]}}",
         "evaluate.prompts: []: there is nothing to draw for kid; give prompts, or auto"),
        ("evaluate.beside.metrics=[kdi]", f"evaluate.beside.metrics.0: 'kdi': no such metric; there are {KNOWN}"),
        ("train.early_stopping.patience=0",
         "train.early_stopping.patience: 0: should be greater than or equal to 1"),
        ("train.early_stopping.min_delta=-0.1",
         "train.early_stopping.min_delta: -0.1: should be greater than or equal to 0"),
        ("train.early_stopping={patience: 2}",
         "train.early_stopping: there is nothing to judge by; set data.validation, such as 0.05"),
        ("evaluate.every=0", "evaluate.every: 0: should be greater than or equal to 1"),
        ("evaluate.prompts=a dog", "evaluate.prompts: 'a dog': should be 'auto' or a list"),
        ("evaluate.prompts=['']", "evaluate.prompts.0: '': should not be empty"),
        ("evaluate.negative_prompt=5", "evaluate.negative_prompt: 5: should be text"),
        ("evaluate.steps=1000", "evaluate.steps: 1000: should be less than or equal to 999"),
        ("evaluate.guidance=-1", "evaluate.guidance: -1: should be greater than or equal to 0"),
        ("evaluate.seed=-1", "evaluate.seed: -1: should be greater than or equal to 0"),
        ("storage.runs=''", "storage.runs: '': should not be empty"),
        ("tuner={train: [text_encoder], freeze_depth: 2}",
         "tuner: freeze_depth: 2: is of blocks of the denoiser, which train: [text_encoder] leaves as it is; leave one "
         "of the two out"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_one_line(override: str, message: str) -> None:
    assert mistake(override) == message


def test_a_long_value_is_shown_in_part() -> None:
    text = mistake(f"model.dtype={'x' * 500}")
    assert text == f"model.dtype: '{'x' * 79}...: should be 'auto', 'fp32' or 'bf16'"


def test_an_unknown_key_is_named_before_the_value_that_it_leaves_missing() -> None:
    with pytest.raises(UserError, match=r"^data\.sorce: unknown key; did you mean data\.source\?$"):
        parse_recipe({"model": {"source": "org/name"}, "data": {"sorce": "photos"}})


@pytest.mark.parametrize(
    ("overrides", "steps", "epochs"),
    [
        ((), 1000, None),
        (("train.steps=5",), 5, None),
        (("train.epochs=2",), None, 2),
        (("train.epochs=2", "train.steps=null"), None, 2),
        (("train.epochs=null", "train.steps=5"), 5, None),
        (("train=",), 1000, None),
    ],
)
def test_steps_or_epochs(overrides: tuple[str, ...], steps: int | None, epochs: int | None) -> None:
    made = recipe(*overrides).train
    assert (made.steps, made.epochs) == (steps, epochs)


def test_steps_and_epochs_are_one_too_many_or_too_few() -> None:
    both = "train: steps is 5 and epochs is 2; keep one and set the other to null"
    assert mistake("train.steps=5", "train.epochs=2") == both
    assert mistake("train.steps=null") == "train: steps and epochs are both null; give one"


def test_alpha_auto_is_the_rank() -> None:
    assert recipe("tuner.rank=8").tuner.resolved_alpha == 8.0
    assert recipe("tuner.rank=8", "tuner.alpha=2.5").tuner.resolved_alpha == 2.5


@pytest.mark.parametrize(
    ("tuner", "text"),
    [
        ("{type: lora}", "embeddings"),
        ("{train: [unet]}", "embeddings"),
        ("{train: [unet, text_encoder]}", "tokens"),
        ("{type: full}", "embeddings"),
        ("{type: full, train: [text_encoder_2]}", "tokens"),
        ("{type: freeze, freeze_depth: 3}", "embeddings"),
    ],
)
def test_a_text_encoder_that_learns_reads_tokens(tuner: str, text: str) -> None:
    made = recipe(f"tuner={tuner}")
    assert made.needs == Needs(images="latents", text=text, live=())
    assert parse_recipe(made.model_dump(mode="json")) == made


def test_a_zero_stage_above_the_pair_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert recipe("train.zero.stage=3").train.zero.stage == 3
    row = PAIRS["lora", "denoise"]
    monkeypatch.setitem(PAIRS, ("lora", "denoise"), Pair(row.needs, max_zero_stage=1))
    assert recipe("train.zero.stage=1").pair.max_zero_stage == 1
    assert mistake("train.zero.stage=2") == "train.zero.stage: 2: lora with denoise bears at most 1"


@pytest.mark.parametrize("key", ["activation_checkpointing", "compile"])
def test_what_goes_block_by_block_is_refused_without_blocks(key: str) -> None:
    assert mistake("objective.type=autoencode", "tuner.type=full", f"train.{key}=true") == (
        f"train.{key}: true: goes block by block, which an autoencoder is not divided into"
    )
    assert getattr(recipe(f"train.{key}=true").train, key) is True


def test_a_pair_outside_the_table_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError) as caught:
        pair("lora", "classify")
    assert str(caught.value) == (
        "objective.type: 'classify' does not go with tuner.type 'lora'; allowed with it: consistency, denoise, instruct"
    )
    monkeypatch.delitem(PAIRS, ("lora", "denoise"))
    assert mistake() == (
        "objective.type: 'denoise' does not go with tuner.type 'lora'; allowed with it: consistency, instruct"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected sections such as `model:` and `data:`, found nothing"),
        ("# only a comment\n", "expected sections such as `model:` and `data:`, found nothing"),
        ("- a\n- b\n", "expected sections such as `model:` and `data:`, found list"),
        ("train: {steps: 1}\nmodel: {}\ntrain: {epochs: 1}\n",
         "not valid YAML: line 3: the key 'train' is given twice; keep one"),
        ("train:\n  steps: 1\n  zero: {stage: 1, stage: 2}\n",
         "not valid YAML: line 3: the key 'stage' is given twice; keep one"),
        ("train: a: b\n", "not valid YAML: line 1: mapping values are not allowed here"),
        ("train:\n\tsteps: 1\n", "not valid YAML: line 2: found character '\\t' that cannot start any token"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_recipe(text: str, message: str, tmp_path: Path) -> None:
    assert file_mistake(tmp_path / "r.yaml", text) == f"recipe {tmp_path}/r.yaml: {message}"


def test_a_path_that_is_no_file(tmp_path: Path) -> None:
    for path, reason in ((tmp_path, "Is a directory"), (tmp_path / "none.yaml", "No such file or directory")):
        with pytest.raises(UserError, match=f"^recipe {re.escape(str(path))}: {reason}; expected a YAML file$"):
            load_recipe(path)
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff")
    with pytest.raises(UserError, match=r"image\.png: not text in UTF-8 \(.*\)$"):
        load_recipe(tmp_path / "image.png")


def test_a_recipe_in_a_bucket(s3: str) -> None:
    folder = Store(s3).sub(uuid.uuid4().hex)
    folder.write("r.yaml", dump_recipe(recipe("train.steps=7")).encode())
    assert load_recipe(folder.url("r.yaml")) == recipe("train.steps=7")
    assert load_recipe(folder.url("r.yaml"), ["train.steps=8"]).train.steps == 8
    folder.write("broken.yaml", b"a: b: c")
    for place, message in (
        (folder.url("none.yaml"), "recipe {}: No such file or directory; expected a YAML file"),
        (folder.url("broken.yaml"), "recipe {}: not valid YAML: line 1: mapping values are not allowed here"),
        ("s3://no-such-bucket/r.yaml", "recipe {}: No such file or directory; expected a YAML file"),
    ):
        with pytest.raises(UserError) as caught:
            load_recipe(place)
        assert str(caught.value) == message.format(place)


def test_an_empty_section_means_its_defaults(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(
        "model:\n  source: org/name\ndata:\n  source: s3://b\ntrain:\n  zero:\ntuner:\nobjective:\nstorage:\n"
    )
    full = parse_recipe(yaml.safe_load("{model: {source: org/name}, data: {source: 's3://b'}}"))
    assert load_recipe(file) == full


def test_the_input_of_a_parse_is_not_changed() -> None:
    values = {"model": {"source": "./m"}, "data": {"source": [{"source": "a"}]}, "train": None}
    before = copy.deepcopy(values)
    parse_recipe(values)
    assert values == before


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("dog", Reference("dog", None, 1.0)),
        ("dog:0.5", Reference("dog", None, 0.5)),
        ("dog@prod", Reference("dog", "prod", 1.0)),
        ("a.b-c_1@20260101-000000-000-abc123:-1", Reference("a.b-c_1", "20260101-000000-000-abc123", -1.0)),
    ],
)
def test_a_reference_to_an_adapter(text: str, reference: Reference) -> None:
    assert parse_reference(text) == reference


@pytest.mark.parametrize(
    "text", ["", "Dog", "dog@", "@prod", "dog:", "dog:x", "dog:nan", "dog:inf", "dog@a@b", "../dog"]
)
def test_no_reference(text: str) -> None:
    with pytest.raises(UserError, match=rf"^adapter {re.escape(repr(text))}: "):
        parse_reference(text)


@pytest.mark.parametrize("name", ["", "..", "a/b", "-a", "A", "a b", "a\n"])
def test_no_name(name: str) -> None:
    with pytest.raises(UserError, match=r"^--name: "):
        check_name(name, "--name")


def test_versions_sort_by_time_and_differ() -> None:
    made = [new_version("same") for _ in range(50)]
    assert len(set(made)) == 50
    assert [v[:19] for v in made] == sorted(v[:19] for v in made)
    assert all(re.fullmatch(r"\d{8}-\d{6}-\d{3}-[0-9a-f]{6}", v) and check_name(v) for v in made)
