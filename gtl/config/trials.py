"""Whether the parts of a study go together, and whether the recipe takes what its space may draw."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gtl.config.judged import check_measured
from gtl.config.search import Asha, Pbt
from gtl.config.space import Domain, Space, alternatives, ancestors, applying, count_points, label, points
from gtl.config.tuners import LoraTuner, PromptTuner, Tuner
from gtl.types import UserError

if TYPE_CHECKING:
    from gtl.config.study import Study

PACKED = (
    "tuner.rank", "tuner.alpha", "tuner.freeze_depth", "train.learning_rate", "train.schedule", "train.seed",
)  # fmt: skip
"""Keys in which the trials of a pack may differ."""
MUTABLE = (
    "train.learning_rate", "train.max_grad_norm", "train.optimizer.betas", "train.optimizer.eps",
    "train.optimizer.weight_decay", "tuner.dropout", "objective.caption_dropout", "objective.min_snr_gamma",
    "objective.offset_noise", "objective.timesteps",
)  # fmt: skip
"""Keys that may change in the middle of a run: the weights and the data stay what they are."""
PARAMETRISATION = ("tuner", "tuner.type", "tuner.alpha", "tuner.rslora", "tuner.initialization", "tuner.dora")
"""Keys that decide whether a rate holds at another rank."""
MOST_PROBES = 256
"""Recipes that are checked when a study is parsed: some milliseconds' work."""


def check_fit(study: Study) -> None:
    """Refuse a scheduler, a searcher or a way to run trials that does not suit the rest.

    Raises:
        UserError: names the key.
    """
    scheduler, searcher, several = study.scheduler, study.searcher, len(study.metrics) > 1
    if several and scheduler.type != "fifo":
        raise UserError(
            f"scheduler.type: {scheduler.type}: goes by one metric, and metric names {len(study.metrics)}; take fifo"
        )
    if several and searcher.type in ("hyperopt", "bohb"):
        raise UserError(
            f"searcher.type: {searcher.type}: goes by one metric, and metric names {len(study.metrics)}; take optuna"
        )
    if (scheduler.type == "bohb") != (searcher.type == "bohb"):
        raise UserError(
            f"scheduler.type: {scheduler.type} with searcher.type: {searcher.type}: bohb is the two together; "
            "set both to it, or neither"
        )
    if isinstance(scheduler, Pbt):
        check_population(study, scheduler)
    if study.pack not in ("auto", "off"):
        check_pack(study)
    if study.transfer_rank:
        check_transfer(study)


def check_population(study: Study, scheduler: Pbt) -> None:
    """Refuse what a population cannot exchange.

    Raises:
        UserError: names the key.
    """
    if study.searcher.type != "random":
        raise UserError(f"searcher.type: {study.searcher.type}: pbt draws for itself; take random")
    for key, domain in study.space.items():
        if not key.startswith(MUTABLE):
            raise UserError(
                f"space.{key}: cannot change in the middle of a run, as pbt does; put it under set, or take asha"
            )
        if domain.when:
            raise UserError(f"space.{key}.when: pbt changes all keys at once; leave the condition out")
    if study.num_trials * scheduler.quantile < 1:
        raise UserError(
            f"trials: {study.num_trials}: a quantile of {scheduler.quantile:g} of them is nobody; "
            f"take {round(1 / scheduler.quantile + 0.499)} or more"
        )


def check_pack(study: Study) -> None:
    """Refuse a pack of trials that cannot be in one.

    Raises:
        UserError: names the key.
    """
    if (reason := unpacked(study)) is not None:
        raise UserError(f"pack: {study.pack}: {reason}; take auto or off")


def unpacked(study: Study) -> str | None:
    """Why trials of a study cannot train in one forward pass, naming a key; None: they can."""
    if others := [key for key in study.space if not key.startswith(PACKED)]:
        return f"trials differ in {others[0]}, so one pass is not for all"
    if study.scheduler.type in ("pbt", "hyperband", "bohb"):
        return f"scheduler.type: {study.scheduler.type}: lets trials wait for each other, and a pass is of all at once"
    tuner, objective, model, train = study.base.tuner, study.base.objective, study.base.model, study.base.train
    if isinstance(tuner, PromptTuner):
        return f"tuner.type: {tuner.type}: is a word in the text encoders, which all share"
    if not isinstance(tuner, LoraTuner):
        return f"tuner.type: {tuner.type}: moves the model's own weights, which all share"
    if tuner.token is not None:
        return f"tuner.token: {tuner.token}: is a word in the text encoders, which all share"
    if tuner.dora:
        return "tuner.dora: true: rescales the model's own weights, which all share"
    if tuner.dropout:
        return f"tuner.dropout: {tuner.dropout:g}: is drawn for the whole batch, so a trial would depend on others"
    if tuner.initialization.startswith(("pissa", "olora")):
        return f"tuner.initialization: {tuner.initialization}: changes the model's own weights, which all share"
    for key, value, bearable in (
        ("objective.type", objective.type, ("denoise",)),
        ("model.quantization", model.quantization, (None,)),
        ("train.optimizer.type", train.optimizer.type, ("adamw",)),
        ("train.compile", train.compile, (False,)),
        ("train.workers", train.workers, (1, "auto")),
        ("train.zero.stage", train.zero.stage, (0, "auto")),
    ):
        if value not in bearable:
            return f"{key}: {label(value)}: a pack is one process with the whole model; set {label(bearable[0])}"
    return None


def check_transfer(study: Study) -> None:
    """Refuse to carry a rate over ranks where there are none.

    Raises:
        UserError: names the key.
    """
    for key in ("tuner.rank", "train.learning_rate"):
        if key not in study.space:
            raise UserError(f"transfer_rank: true: carries the learning rate over ranks; {key} is not in the space")
    for key, domain in study.space.items():
        if key in PARAMETRISATION:
            raise UserError(f"space.{key}: transfer_rank: true: a rate holds for one of them; put it under set")
        if domain.when and key in ("tuner.rank", "train.learning_rate"):
            raise UserError(f"space.{key}.when: transfer_rank: true: every trial has one; leave the condition out")
    if not study.space["tuner.rank"].is_list or study.space["tuner.rank"].size == 1:
        raise UserError("transfer_rank: true: needs ranks listed, two or more; give space.tuner.rank choice or grid")
    if len(study.metrics) > 1 or isinstance(study.scheduler, Pbt):
        raise UserError("transfer_rank: true: carries the rate that is best by one metric and for a whole run; "
                        "take one metric and asha or fifo")  # fmt: skip
    check_steps(study.base.tuner, study.space["tuner.rank"].values)


def check_steps(tuner: Tuner, ranks: Sequence[int]) -> None:
    """Refuse adapters whose first step, and so whose best rate, is known to change with the rank.

    Raises:
        UserError: says what would be right.
    """
    if not isinstance(tuner, LoraTuner):
        raise UserError(f"transfer_rank: true: is of LoRA trials, and tuner.type is {tuner.type}")
    small, large = (tuner.model_copy(update={"rank": rank}).step_size for rank in (min(ranks), max(ranks)))
    if small is None or large is None:
        raise UserError(
            "transfer_rank: true: how a rate moves with the rank is not known for tuner.initialization: "
            f"{tuner.initialization}; take default or random_b"
        )
    if not math.isclose(small, large):
        wanted = "a number, such as 16" if tuner.initialization == "default" else "auto"
        also = " and tuner.rslora: false" if tuner.rslora else ""
        raise UserError(
            f"transfer_rank: true: with tuner.alpha: {tuner.alpha} the best rate moves with the rank; "
            f"set it to {wanted}{also}"
        )


def check_looks(study: Study) -> None:
    """Refuse a scheduler that would see nothing before the end.

    Raises:
        UserError: names the key.
    """
    scheduler, steps, every = study.scheduler, longest(study), study.base.evaluate.every
    if scheduler.type == "fifo" or steps is None:
        return
    if every >= steps:
        raise UserError(
            f"evaluate.every: {every}: nothing is measured before the last of {steps} steps, so {scheduler.type} has "
            f"nothing to go by; set it to {max(1, steps // 9)}, or scheduler.type: fifo"
        )
    name, first = ("grace_period", scheduler.grace_period) if isinstance(scheduler, Asha) else ("interval", "auto")
    if isinstance(scheduler, Pbt):
        first = scheduler.interval
    last = (steps - 1) // every * every
    if isinstance(first, int) and first > last:
        raise UserError(f"scheduler.{name}: {first}: is behind the last look before the end, at step {last} of {steps}")


def longest(study: Study) -> int | None:
    """Optimizer steps of the longest trial; None where the recipe says epochs, or a trial's whole `train` is drawn."""
    domain = study.space.get("train.steps")
    if domain is not None:
        return int(max(domain.probes))
    return None if "train.epochs" in study.space or "train" in study.space else study.base.train.steps


def check_trials(study: Study) -> None:
    """Refuse a space that draws what the recipe does not take: every choice, the ends of ranges, and what is between.

    Raises:
        UserError: names the recipe's key, and the configuration.
    """
    for values in probes(study.space):
        try:
            check_measured(study.recipe_of(values), study.measured)
        except UserError as error:
            check_kind(study, values, str(error))
            shown = ", ".join(f"{key}: {label(value)}" for key, value in values.items())
            raise UserError(f"space: {error} (with {shown})") from None


def check_kind(study: Study, values: Mapping[str, Any], error: str) -> None:
    """Refuse a key of the space that is one of another kind of section than a trial's.

    Raises:
        UserError: says so, where the recipe's error is that it does not know the key.
    """
    for key in values:
        if error.startswith(f"{key}: unknown key"):
            decides = f"{key.partition('.')[0]}.type"
            kind = values.get(decides) or study.base.model_dump()[key.partition(".")[0]]["type"]
            advice = f"add when: {{{decides}: ...}}" if decides in study.space else f"set {decides}, or leave it out"
            raise UserError(f"space.{key}: with {decides}: {kind} there is no such key; {advice}")


def probes(space: Space) -> Iterator[Mapping[str, Any]]:
    """Configurations that stand for all: every one of the probes' combinations, or some with each of them in it."""
    deciding = {parent for domain in space.values() for parent in domain.when}
    few = {
        key: Domain(choice=tuple(domain.values if key in deciding else domain.probes), when=domain.when)
        for key, domain in space.items()
    }
    if (count_points(few) or 0) <= MOST_PROBES:
        return points(few)
    rng = random.Random(0)
    drawn = ({key: rng.choice(domain.values) for key, domain in few.items()} for _ in range(MOST_PROBES))
    each = (with_value(few, key, value) for key, domain in few.items() for value in domain.values)
    return itertools.chain(each, (applying(few, values) for values in drawn))


def with_value(space: Space, key: str, value: Any) -> dict[str, Any]:
    """A configuration in which a key has a value, and the others their first one where they can."""
    values = {other: domain.values[0] for other, domain in space.items()} | {key: value}
    needed = {key, *ancestors(space, key)}
    for child in needed:
        values |= {parent: alternatives(wanted)[0] for parent, wanted in space[child].when.items()}
    return applying(space, values)
