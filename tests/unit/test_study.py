"""The study file: what it reads, what it writes back, and what it says about mistakes."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from gtl.config import Study, load_recipe, load_study, parse_study
from gtl.config.load import dump_study, set_study_key
from gtl.config.metrics import METRICS
from gtl.config.search import Asha, Fifo
from gtl.config.trials import MOST_PROBES
from gtl.search.pack import best_count
from gtl.types import UserError

ROOT = Path(__file__).resolve().parents[2]
STUDIES = sorted((ROOT / "tune_configs").rglob("*.y*ml"))
BASE: dict[str, Any] = {
    "recipe": {
        "model": {"source": "org/name"}, "data": {"source": "s3://bucket/photos"},
        "tuner": {"type": "lora", "targets": "all-linear"}, "train": {"steps": 300}, "evaluate": {"every": 30},
    },
    "space": {"train.learning_rate": {"loguniform": [1e-5, 1e-2]}},
    "metric": "kid",
}  # fmt: skip
KINDS = (
    "space={tuner.type: {choice: [lora, freeze]}, tuner.rank: {choice: [4, 8], when: {tuner.type: lora}}, "
    "tuner.freeze_depth: {quniform: [0.0, 0.8, 0.2], when: {tuner.type: freeze}}}"
)

RANKS = ("transfer_rank=true", "space.tuner.rank={choice: [4, 8]}")


def study(*overrides: str) -> Study:
    values = copy.deepcopy(BASE)
    for override in overrides:
        set_study_key(values, override, "study.yaml")
    return parse_study(values)


def mistake(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        study(*overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_shortest_study_has_defaults() -> None:
    made = study()
    assert (made.metrics, made.directions, made.num_points, made.num_trials) == (("kid",), {"kid": "min"}, None, 16)
    assert made.scheduler == Asha(grace_period="auto", reduction_factor=3, brackets=1)
    assert (made.searcher.type, made.searcher.seed, made.concurrency, made.pack) == ("random", 0, "auto", "auto")
    assert (made.publish.top, made.confirm.top, made.confirm.samples) == (1, 3, None)


def test_what_is_written_reads_back_the_same(tmp_path: Path) -> None:
    made = study(
        KINDS, "set={train: null}", "set={train.epochs: 3}", "metric=[kid, adapter_bytes]", "budget.hours=2",
        "pack=off", "searcher={type: optuna, seed: 3}",
    )  # fmt: skip
    (tmp_path / "study.yaml").write_text(dump_study(made))
    again = load_study(tmp_path / "study.yaml")
    assert again == made
    values = {"tuner.type": "freeze", "tuner.freeze_depth": 0.4}
    assert again.recipe_of(values) == made.recipe_of(values)
    assert yaml.safe_load(dump_study(made))["space"]["tuner.rank"] == {"choice": [4, 8], "when": {"tuner.type": "lora"}}


def test_a_configuration_becomes_a_recipe_without_what_does_not_apply() -> None:
    made = study(KINDS, "set.train.schedule.warmup=5")
    recipe = made.recipe_of({"tuner.type": "lora", "tuner.rank": 8, "tuner.freeze_depth": 0.4, "trial": 3})
    assert (recipe.tuner.type, recipe.tuner.rank, recipe.tuner.freeze_depth) == ("lora", 8, 0)
    assert (recipe.tuner.targets, recipe.train.schedule.warmup, recipe.train.steps) == ("all-linear", 5, 300)
    other = made.recipe_of({"tuner.type": "freeze", "tuner.rank": 8, "tuner.freeze_depth": 0.4})
    alone = {"only": None, "discriminator_depth": 0, "init": None}
    assert other.tuner.model_dump() == {"type": "freeze", "freeze_depth": 0.4, **alone}
    assert made.base.tuner == study().recipe.tuner


def test_numbers_are_put_on_the_steps_of_their_ranges() -> None:
    made = study(
        "space={tuner.freeze_depth: {quniform: [0.1, 0.7, 0.2]}, train.batch_size: {qrandint: [4, 16, 4]},"
        " train.ema: {uniform: [0.9, 0.999]}, train.learning_rate: {qloguniform: [0.001, 0.01, 0.001]}}"
    )
    drawn = {"tuner.freeze_depth": 0.53, "train.batch_size": 9.4, "train.ema": 2.0, "train.learning_rate": 0.0034}
    found = made.configuration(drawn)
    assert found == {
        "tuner.freeze_depth": 0.5, "train.batch_size": 8, "train.ema": 0.999, "train.learning_rate": 0.003,
    }  # fmt: skip
    assert type(found["train.batch_size"]) is int
    assert made.space["tuner.freeze_depth"].values == [0.1, 0.3, 0.5, 0.7]


def test_steps_take_the_place_of_epochs() -> None:
    made = study("recipe.train={epochs: 2}", "set.train.steps=70")
    assert (made.base.train.steps, made.base.train.epochs) == (70, None)
    again = study("set.train.epochs=2")
    assert (again.base.train.steps, again.base.train.epochs) == (None, 2)


@pytest.mark.parametrize(
    ("override", "trials"),
    [
        ("trials=5", 5),
        ("space={tuner.rank: {choice: [2, 4, 8]}}", 3),
        ("budget.gpu_hours=4", 1000),
        ("searcher.type=optuna", 16),
    ],
)
def test_how_many_trials_there_are(override: str, trials: int) -> None:
    assert study(override).num_trials == trials


def test_a_budget_makes_no_population_larger() -> None:
    assert study("scheduler.type=pbt", "budget.hours=4").num_trials == 16
    assert study("scheduler.type=pbt", "budget.hours=4", "trials=6").num_trials == 6


def test_a_grid_has_its_points_and_conditions_make_them_fewer() -> None:
    made = study(KINDS, "searcher.type=grid")
    assert (made.num_points, made.num_trials) == (2 + 5, 7)
    huge = "space={train.seed: {randint: [0, 999]}, data.crops: {randint: [1, 10]}}"
    assert study(huge, "searcher.type=grid", "trials=50").num_trials == 50
    assert study(huge, "searcher.type=grid", "budget.hours=1").num_trials == 10_000


def test_set_addresses_dotted_keys(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(BASE["recipe"]))
    file = tmp_path / "study.yaml"
    file.write_text(
        "recipe: recipe.yaml\nset: {train.steps: 100}\nmetric: kid\nspace:\n"
        "  tuner.type: {choice: [lora, full]}\n  tuner.rank: {choice: [4, 8], when: {tuner.type: lora}}\n"
    )
    made = load_study(
        file,
        [
            "trials=4", "recipe.train.batch_size=2", "set.train.steps=90", "set.train.ema=0.9",
            "space.tuner.rank.choice=[2]", "space.tuner.rank.when.tuner.type=[lora]",
            "space.train.learning_rate={uniform: [1e-4, 1e-3]}", "set.train.ema=0.95",
        ],
    )  # fmt: skip
    assert (made.num_trials, made.recipe.train.batch_size, made.recipe.train.steps) == (4, 2, 300)
    assert made.set == {"train.steps": 90, "train.ema": 0.95}
    assert [*made.space] == ["tuner.type", "tuner.rank", "train.learning_rate"]
    assert made.space["tuner.rank"].model_dump() == {"choice": [2], "when": {"tuner.type": ["lora"]}}
    assert made.space["train.learning_rate"].bounds == (1e-4, 1e-3)


def test_a_recipe_is_looked_for_beside_the_study_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "study.yaml").write_text(yaml.safe_dump({**BASE, "recipe": "r.yaml"}))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^recipe r\.yaml: No such file or directory; expected a YAML file$"):
        load_study("studies/study.yaml")
    for folder, steps in ((tmp_path, 11), (tmp_path / "studies", 99)):
        recipe = {**BASE["recipe"], "train": {"steps": steps}, "evaluate": {"every": 5}}
        (folder / "r.yaml").write_text(yaml.safe_dump(recipe))
        assert load_study("studies/study.yaml").base.train.steps == steps
    assert load_study("studies/study.yaml").recipe == load_recipe("studies/r.yaml")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        # keys
        (["trails=3"], "trails: unknown key; did you mean trials?"),
        (["searcher.sede=3"], "searcher.sede: unknown key; did you mean searcher.seed?"),
        (["scheduler={type: pbt, grace_period: 3}"],
         "scheduler.grace_period: unknown key; known keys: type, interval, quantile, resample, factors"),
        (["scheduler.type=ashes"], "scheduler.type: 'ashes': should be 'asha', 'fifo', 'hyperband', 'bohb' or 'pbt'"),
        (["recipe.train.stepz=3"], "recipe.train.stepz: unknown key; did you mean recipe.train.steps?"),
        (["recipe.model="], "recipe.model.source: missing; a study needs it"),
        (["recipe="], "recipe.model: missing; a study needs it"),
        (["set.train.stepz=3"], "set: train.stepz: no such key of a recipe; did you mean train.steps?"),
        (["set.train.steps=0"], "set: train.steps: 0: should be greater than or equal to 1"),
        (["set.model.source.x=0"], "set: model.source.x: no such key of a recipe; did you mean model.source?"),
        (["set.train.learning_rate=1e-3"],
         "set.train.learning_rate: trials have what space.train.learning_rate draws instead; leave one of the two out"),
        (["set.train.ema=0.9", "space={train: {choice: [{steps: 60}]}}"],
         "set.train.ema: trials have what space.train draws instead; leave one of the two out"),
        (["set.x=0"], "set: x: no such key of a recipe; it is dotted, such as train.learning_rate"),
        # the space
        (["space="], "space: None: should be a section with keys"),
        (["space={}"], "space: there is nothing to search; give keys, such as train.learning_rate: "
         "{loguniform: [1e-5, 1e-2]}"),
        (["space={learning_rate: {uniform: [0, 1]}}"],
         "space: learning_rate: no such key of a recipe; did you mean train.learning_rate?"),
        (["space={tuner.rnk: {choice: [1]}}"], "space: tuner.rnk: no such key of a recipe; did you mean tuner.rank?"),
        (["space={weight: {choice: [1]}}"],
         "space: weight: no such key of a recipe; did you mean objective.prior.weight or objective.weight?"),
        (["space={tuner.rank: {choce: [1]}}"], "space.tuner.rank.choce: unknown key; did you mean "
         "space.tuner.rank.choice?"),
        (["space={tuner.rank: 4}"], "space.tuner.rank: 4: should be a section with the keys grid, choice, uniform, "
         "loguniform, quniform, qloguniform, randint, qrandint, when"),
        (["space={tuner.rank: {when: {a: 1}}}"], "space.tuner.rank: should have one of grid, choice, uniform, "
         "loguniform, quniform, qloguniform, randint, qrandint; found none"),
        (["space={tuner.rank: {choice: [1], grid: [1]}}"],
         "space.tuner.rank: should have one of grid, choice, uniform, loguniform, quniform, qloguniform, randint, "
         "qrandint; found grid and choice"),
        (["space={tuner.rank: {choice: []}}"], "space.tuner.rank.choice: []: should have at least 1 in its list"),
        (["space={tuner.rank: {choice: [4, 4]}}"], "space.tuner.rank.choice: [4, 4]: should have each value once"),
        (["space={train.ema: {uniform: [0.9, 0.1]}}"],
         "space.train.ema.uniform: [0.9, 0.1]: should be [lowest, highest], the smaller one first"),
        (["space={train.ema: {uniform: [0.9, x]}}"], "space.train.ema.uniform.1: 'x': should be a number"),
        (["space={train.ema: {uniform: [0.9]}}"], "space.train.ema.uniform.1: missing; a study needs it"),
        (["space={train.learning_rate: {loguniform: [0, 1]}}"],
         "space.train.learning_rate.loguniform: [0, 1]: should begin above 0, since it is drawn by its logarithm"),
        (["space={tuner.rank: {qrandint: [1, 8, 4]}}"], "space.tuner.rank.qrandint: [1, 8, 4]: should have a step that "
         "goes into highest - lowest a whole number of times"),
        (["space={train.ema: {quniform: [0.0, 0.9, 1.0e-320]}}"],
         "space.train.ema.quniform: [0.0, 0.9, 1e-320]: should have a larger step: there are more values than a "
         "number can say"),
        (["space={train.learning_rate: {loguniform: [1.0e-300, 1.0e+300]}}"],
         "space.train.learning_rate.loguniform: [1e-300, 1e+300]: should be narrower: highest / lowest is more than a "
         "number can be"),
        (["space={tuner.rank: {randint: [1.5, 8]}}"], "space.tuner.rank.randint.0: 1.5: should be a whole number"),
        (["space={tuner: {choice: [{type: lora}]}, tuner.rank: {choice: [2]}}"],
         "space: tuner.rank: is inside tuner, which is drawn whole; leave one of the two out"),
        (["space={tuner.rank: {choice: [2], when: {tuner.type: lora}}}"],
         "space: tuner.rank.when.tuner.type: is no key of this space, so nothing decides it; there are tuner.rank"),
        (["space={tuner.type: {choice: [lora]}, tuner.rank: {choice: [2], when: {tuner.type: full}}}"],
         "space: tuner.rank.when.tuner.type: 'full': never is; it is lora"),
        (["space={train.ema: {uniform: [0.1, 0.2]}, tuner.rank: {choice: [2], when: {train.ema: 0.1}}}"],
         "space: tuner.rank.when.train.ema: has more values than can be named; give it choice, grid or a step"),
        (["space={tuner.type: {choice: [lora]}, tuner.rank: {choice: [2], when: {tuner.type: []}}}"],
         "space: tuner.rank.when.tuner.type: []: never is; it is lora"),
        (["space={tuner.rank: {choice: [2], when: {tuner.alpha: 2}}, "
          "tuner.alpha: {choice: [2], when: {tuner.rank: 2}}}"],
         "space: tuner.rank.when.tuner.alpha: depends on tuner.rank itself"),
        (["space={train.seed: {randint: [0, 4294967294]}, tuner.rank: {choice: [2], when: {train.seed: 3}}}"],
         "space: tuner.rank.when.train.seed: has more values than can be named; give it choice, grid or a step"),
        # what the recipe refuses
        (["space={tuner.rank: {choice: [4, 0]}}"],
         "space: tuner.rank: 0: should be greater than or equal to 1 (with tuner.rank: 0)"),
        (["space={train.ema: {uniform: [0.5, 1]}}"],
         "space: train.ema: 1.0: should be less than 1 (with train.ema: 1.0)"),
        (["space={tuner.rank: {uniform: [4, 8]}}"],
         "space: tuner.rank: 5.5280000000000005: should be a whole number (with tuner.rank: 5.5280000000000005)"),
        (["space={tuner.type: {choice: [lora, full]}, tuner.rank: {choice: [2]}}"],
         "space.tuner.rank: with tuner.type: full there is no such key; add when: {tuner.type: ...}"),
        (["set.tuner.type=full", "space={tuner.rank: {choice: [2]}}"],
         "space.tuner.rank: with tuner.type: full there is no such key; set tuner.type, or leave it out"),
        (["space={train.learning_rate: {choice: [2024-01-01]}}"],
         "space: train.learning_rate: datetime.date(2024, 1, 1): should be a number "
         '(with train.learning_rate: "2024-01-01")'),
        (["space={train.steps: {choice: [x, 60]}}"], "space: train.steps: 'x': should be a whole number (with "
         "train.steps: x)"),
        (["space={train.steps: {choice: [null, 60]}}"], "space: train: steps and epochs are both null; give one (with "
         "train.steps: null)"),
        # how many
        (["searcher.type=grid"],
         "space.train.learning_rate: loguniform: a grid needs listed values or steps; take grid, "
         "quniform or randint, or searcher.type: random"),
        (["space={train.seed: {randint: [1, 1001]}}", "searcher.type=grid"],
         "space: a grid of 1,001 points; say how many: trials, budget.hours or budget.gpu_hours"),
        (["space={train.seed: {randint: [0, 4294967294]}}", "searcher.type=grid", "trials=16"],
         "space: a grid of 4,294,967,295 points: more than 100,000 are not listed to draw trials from; "
         "take searcher.type: random"),
        (["trials=100001"], "trials: 100001: should be less than or equal to 100000"),
        (["trials=0"], "trials: 0: should be greater than or equal to 1"),
        (["budget.hours=0"], "budget.hours: 0: should be greater than 0"),
        # metrics
        (["metric=kidd"], f"metric: 'kidd': no such metric; there are {', '.join(METRICS)}, and the costs "
         "adapter_bytes, device_hours, inference_tflops"),
        (["metric=[kid, kid]"], "metric: [kid, kid]: should name each metric once"),
        (["metric=adapter_bytes"], "metric: adapter_bytes: the cheapest model learns nothing; add a metric of quality"),
        (["metric=val_loss"], "metric: val_loss: needs images that are held out; set data.validation, such as 0.05"),
        (["metric=memorization"],
         "metric: memorization: needs images that are held out; set data.validation, such as 0.05"),
        (["metric=cmmd"], "metric: cmmd: needs a CLIP model; set evaluate.clip to its folder or hub id"),
        (["metric=accuracy", "set.data.validation=0.1"],
         "metric: evaluate.beside.metrics: accuracy: comes of objective.type: classify, and not of denoise"),
        (["metric=fid"], "metric: evaluate.beside.samples: 64: fid needs at least 100"),
        (["metric=fid", "set.evaluate.beside.samples=100", "confirm.samples=8"],
         "confirm.samples: 8: fid needs at least 100"),
        (["metric=fid", "set.evaluate.beside.samples=100", "set.evaluate.samples=99"],
         "set.evaluate.samples: 99: fid needs at least 100"),
        (["set.evaluate.prompts=[]"], "metric: kid: there is nothing to draw; give evaluate.prompts, or auto"),
        (["set={tuner.type: full, objective.type: autoencode}"],
         "metric: kid: is of pictures of prompts, and autoencode draws none"),
        (["space={evaluate.guidance: {uniform: [1, 9]}}"],
         "space.evaluate.guidance: says how a trial is measured, which has to be one way for all; put it under set"),
        (["space={evaluate.steps: {choice: [4, 25]}}"],
         "space.evaluate.steps: decides what a picture costs too; add inference_tflops to metric, or put it under set"),
        (["space={evaluate.guidance: {uniform: [1, 9]}}", "metric=[kid, inference_tflops]"],
         "space.evaluate.guidance: says how a trial is measured, which has to be one way for all; put it under set"),
        (["space={storage.runs: {choice: [a, b]}}"],
         "space.storage.runs: says where things are kept, which all trials share; put it under set"),
        (["space={data.resolution: {choice: [64, 128]}}"],
         "space.data.resolution: kid would be of other images or captions for each value; put it under set"),
        (["set.data.validation=0.1", "metric=val_loss", KINDS],
         "space.tuner.type: val_loss does not tell which kind of "
         "transfer is better; take a metric of pictures, such as kid"),
        (["set.data.validation=0.1", "metric=val_loss", "space={objective.offset_noise: {choice: [0.0, 0.1]}}"],
         "space.objective.offset_noise: each value has a val_loss of its own, which cannot be compared; take a metric "
         "of pictures, such as kid"),
        # parts that do not go together
        (["metric=[kid, adapter_bytes]", "scheduler.type=pbt"],
         "scheduler.type: pbt: goes by one metric, and metric names 2; take fifo"),
        (["metric=[kid, adapter_bytes]", "scheduler.type=asha"],
         "scheduler.type: asha: goes by one metric, and metric names 2; take fifo"),
        (["metric=[kid, adapter_bytes]", "searcher.type=hyperopt"],
         "searcher.type: hyperopt: goes by one metric, and metric names 2; take optuna"),
        (["scheduler.type=bohb"], "scheduler.type: bohb with searcher.type: random: bohb is the two together; set both "
         "to it, or neither"),
        (["scheduler.type=pbt", "searcher.type=optuna"], "searcher.type: optuna: pbt draws for itself; take random"),
        (["scheduler.type=pbt", "space={tuner.rank: {choice: [2, 4]}}"],
         "space.tuner.rank: cannot change in the middle "
         "of a run, as pbt does; put it under set, or take asha"),
        (["scheduler.type=pbt", "trials=3"], "trials: 3: a quantile of 0.25 of them is nobody; take 4 or more"),
        (["scheduler={type: pbt, factors: [1.1, 1.2]}"],
         "scheduler.factors: [1.1, 1.2]: should be [below 1, above 1]"),
        (["set.evaluate.every=300"],
         "evaluate.every: 300: nothing is measured before the last of 300 steps, so asha has "
         "nothing to go by; set it to 33, or scheduler.type: fifo"),
        (["scheduler.grace_period=271"],
         "scheduler.grace_period: 271: is behind the last look before the end, at step 270 of 300"),
        (["pack=4", "set.tuner.type=full"],
         "pack: 4: tuner.type: full: moves the model's own weights, which all share; take auto or off"),
        (["pack=4", "set.tuner.dora=true"],
         "pack: 4: tuner.dora: true: rescales the model's own weights, which all share; take auto or off"),
        (["pack=4", "set.tuner.token=<dog>", "set.tuner.initializer=dog"],
         "pack: 4: tuner.token: <dog>: is a word in the text encoders, which all share; take auto or off"),
        (["pack=4", "set.tuner.dropout=0.1"],
         "pack: 4: tuner.dropout: 0.1: is drawn for the whole batch, so a trial would depend on others; "
         "take auto or off"),
        (["pack=4", "set.tuner.initialization=pissa"],
         "pack: 4: tuner.initialization: pissa: changes the model's own weights, which all share; take auto or off"),
        (["pack=4", "space={train.batch_size: {choice: [2, 4]}}"],
         "pack: 4: trials differ in train.batch_size, so one pass is not for all; take auto or off"),
        (["pack=4", "set.train.workers=2"],
         "pack: 4: train.workers: 2: a pack is one process with the whole model; set 1; take auto or off"),
        (["pack=4", "set.train.optimizer.type=adamw_8bit"],
         "pack: 4: train.optimizer.type: adamw_8bit: a pack is one process with the whole model; set adamw; "
         "take auto or off"),
        (["pack=4", "scheduler.type=hyperband"],
         "pack: 4: scheduler.type: hyperband: lets trials wait for each other, and a pass is of all at once; "
         "take auto or off"),
        (["pack=on"], "pack: True: should not be true or false"),
        (["pack=1"], "pack: 1: should be greater than or equal to 2 or 'auto' or 'off'"),
        (["transfer_rank=true"],
         "transfer_rank: true: carries the learning rate over ranks; tuner.rank is not in the space"),
        ([*RANKS, "space.tuner.rank={choice: [4]}"],
         "transfer_rank: true: needs ranks listed, two or more; give space.tuner.rank choice or grid"),
        ([*RANKS, "space.tuner.rank={randint: [2, 4000000000]}", "set.tuner.alpha=16"],
         "transfer_rank: true: needs ranks listed, two or more; give space.tuner.rank choice or grid"),
        ([*RANKS, "space.tuner.rank={randint: [2, 4000000000]}", "scheduler.type=pbt"],
         "space.tuner.rank: cannot change in the middle of a run, as pbt does; put it under set, or take asha"),
        ([*RANKS], "transfer_rank: true: with tuner.alpha: auto the best rate moves with the rank; "
         "set it to a number, such as 16"),
        ([*RANKS, "set.tuner.alpha=8", "set.tuner.rslora=true"],
         "transfer_rank: true: with tuner.alpha: 8.0 the best rate moves with the rank; set it to a number, such as 16 "
         "and tuner.rslora: false"),
        ([*RANKS, "set.tuner.initialization=random_b", "set.tuner.alpha=8"],
         "transfer_rank: true: with tuner.alpha: 8.0 the best rate moves with the rank; set it to auto"),
        ([*RANKS, "set.tuner.initialization=pissa"], "transfer_rank: true: how a rate moves with the rank is not known "
         "for tuner.initialization: pissa; take default or random_b"),
        ([*RANKS, "space.tuner.alpha={choice: [4, 8]}"],
         "space.tuner.alpha: transfer_rank: true: a rate holds for one of them; put it under set"),
        (["publish.name=Dog"],
         "publish.name: 'Dog': should start with a-z or 0-9 and go on with a-z, 0-9, '.', '_' or '-'"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(overrides: list[str], message: str) -> None:
    assert mistake(*overrides) == message


@pytest.mark.parametrize(
    "overrides",
    [
        ["set.data.validation=0.1", "metric=val_loss", "space={objective.min_snr_gamma: {choice: [null, 5.0]}}"],
        ["space={tuner: {choice: [{type: lora, rank: 2}, {type: full}]}}"],
        ["space={tuner.targets: {choice: [attention, [to_q, to_k]]}}"],
        ["space={train.learning_rate: {choice: [1e-4, 1e-3]}}", "pack=4"],
        [*RANKS, "set.tuner.alpha=16"],
        [*RANKS, "set.tuner.initialization=random_b"],
        ["scheduler.type=pbt", "trials=4"],
        ["scheduler.type=fifo", "set.evaluate.every=300"],
        [
            "metric=[kid, inference_tflops]",
            "space={objective.type: {grid: [denoise, consistency]}, "
            "evaluate.steps: {choice: [2, 4], when: {objective.type: consistency}}}",
        ],
    ],
)
def test_what_goes_together_passes(overrides: list[str]) -> None:
    made = study(*overrides)
    assert parse_study(yaml.safe_load(dump_study(made))) == made


def test_a_wide_space_is_checked_at_every_listed_value() -> None:
    keys = ("train.optimizer.eps", "train.optimizer.weight_decay", "train.ema", "tuner.dropout",
            "objective.caption_dropout", "train.max_grad_norm")  # fmt: skip
    wide = ", ".join(f"{key}: {{uniform: [0.1, 0.9]}}" for key in keys)
    assert 3 ** len(keys) > MOST_PROBES
    wide += ", tuner.alpha: {choice: [1, 2, 3, 4, 5, -6]}"
    assert mistake(f"space={{{wide}}}").startswith("space: tuner.alpha: -6: should be greater than 0")


def test_numbers_that_yaml_takes_for_text_are_numbers() -> None:
    assert study("space={train.learning_rate: {choice: [1e-4, 2.5e-3]}}").space["train.learning_rate"].values == (
        1e-4, 2.5e-3,
    )  # fmt: skip


def test_several_metrics_are_not_stopped_early_by_default() -> None:
    made = study("metric=[prompt_accuracy, adapter_bytes]")
    assert (made.scheduler, made.measured) == (Fifo(), ("prompt_accuracy",))
    assert made.directions == {"prompt_accuracy": "max", "adapter_bytes": "min"}
    costs = study("metric=[kid, adapter_bytes, device_hours, inference_tflops]")
    assert (costs.measured, set(costs.directions.values())) == (("kid",), {"min"})


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_a_ready_study_loads_and_says_how_to_run_it(file: Path) -> None:
    assert load_study(file).num_trials <= (42 if file.stem == "rank_transfer" else 18)
    assert file.read_text().split("recipe:")[0].count(f"#   gtl tune {file.relative_to(ROOT)}\n") == 1


def test_the_ready_studies_are_those_that_were_promised() -> None:
    assert [file.stem for file in STUDIES] == [
        "freeze_depth", "freeze_rank_lr", "learning_rate", "lora_rank", "lora_variants", "pbt_learning_rate",
        "rank_transfer", "smoke", "strategy",
    ]  # fmt: skip
    assert load_study(ROOT / "tune_configs" / "smoke.yaml").num_trials == 4
    ranks = load_study(ROOT / "tune_configs" / "rank_transfer.yaml")
    assert ranks.num_trials == 6 * 7
    assert all(ranks.recipe_of({"tuner.rank": rank}).tuner.step_size == 16 for rank in (2, 64))
    assert load_study(ROOT / "tune_configs" / "rank_transfer.yaml", ["transfer_rank=true"]).num_trials == 7 + 5
    with pytest.raises(UserError, match="val_loss does not tell which kind of transfer is better"):
        load_study(ROOT / "tune_configs" / "strategy.yaml", ["metric=val_loss", "set.data.validation=0.1"])


def test_a_file_that_is_no_study(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("- a\n")
    with pytest.raises(UserError) as caught:
        load_study(tmp_path / "s.yaml")
    assert str(caught.value) == (
        f"study {tmp_path}/s.yaml: expected sections such as `recipe:` and `space:`, found list"
    )


@pytest.mark.parametrize(
    ("seconds", "count", "said"),
    [
        ({1: 1.0, 2: 1.0, 4: 1.6, 8: 4.0}, 4, "4 trials in a pass (times the steps an hour: 2: 2, 4: 2.5, 8: 2)"),
        ({1: 1.0, 2: 1.9}, 1, "off (times the steps an hour: 2: 1.053)"),
        ({}, 1, "off (a step of the largest trial has no room on a device at once)"),
    ],
)
def test_trials_are_packed_where_that_is_worth_it(seconds: dict[int, float], count: int, said: str) -> None:
    told: list[str] = []
    assert best_count(seconds, lambda *row: told.append(row[3])) == count
    assert told == [said]
