"""The study: which recipes are tried, how they are judged and what is published, in one frozen value."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from gtl.config.base import Section
from gtl.config.explain import parse
from gtl.config.judged import COSTS, check_judged
from gtl.config.keys import check_key, over
from gtl.config.metrics import METRICS
from gtl.config.names import NAME
from gtl.config.recipe import Recipe
from gtl.config.search import Asha, Fifo, RandomSearch, Scheduler, Searcher
from gtl.config.space import Domain, Space, applying, check_space, count_points
from gtl.config.trials import check_fit, check_looks, check_trials
from gtl.types import UserError

TRIALS = 16
"""Where neither the file nor a grid nor a budget says how many."""
MOST = 1000
"""Trials that a grid or a budget asks for by itself."""
MOST_LISTED = 100_000
"""Trials of a study, and points of a grid that some of them are drawn from: all are in memory at once."""


class Budget(Section):
    """When a study ends, whatever is still to be tried. Trials that run then are ended and count as stopped."""

    hours: Annotated[float, Field(gt=0)] | None = None
    """On the clock, since the study began; what it was down for does not count."""
    gpu_hours: Annotated[float, Field(gt=0)] | None = None
    """Of all trials together; hours of workers where there are no GPUs."""


def check_name(name: str) -> str:
    """Refuse what a registry would not take."""
    if not NAME.fullmatch(name):
        raise ValueError("should start with a-z or 0-9 and go on with a-z, 0-9, '.', '_' or '-'")
    return name


class Publish(Section):
    """What goes to the registry, with its lineage."""

    top: Annotated[int, Field(ge=0)] = 1
    """The best so many; of several metrics the Pareto front, first."""
    name: Annotated[str, AfterValidator(check_name)] | None = None
    """Their name, each a version of it. null: the study's."""


class Confirm(Section):
    """The best trials are measured again, on seeds that nobody was chosen by, before one is called the winner.

    The best of many noisy numbers is too good by the noise it was chosen for. Pictures are drawn of other noise;
    val_loss is of the same held-out images at other noise and other times.
    """

    top: Annotated[int, Field(ge=0)] = 3
    """So many; 0: none, and the winner is the best by the study's own numbers, without an interval."""
    samples: Annotated[int, Field(ge=8)] | None = None
    """Pictures of each. null: the recipe's evaluate.samples. val_loss draws none."""


def check_metric(name: str) -> str:
    """Refuse a metric that there is none of."""
    if name not in METRICS and name not in COSTS:
        raise ValueError(f"no such metric; there are {', '.join(METRICS)}, and the costs {', '.join(COSTS)}")
    return name


StudyMetric = Annotated[str, AfterValidator(check_metric)]


def default_scheduler(given: dict[str, Any]) -> Asha | Fifo:
    """Trials may be stopped by one metric; a Pareto front needs all of them, at the end."""
    return Fifo() if isinstance(given.get("metric"), list) and len(given["metric"]) > 1 else Asha()


def check_keys(changes: dict[str, Any]) -> dict[str, Any]:
    """Refuse keys that no recipe has."""
    for key in changes:
        check_key(key, Recipe, key)
    return changes


class Study(Section):
    """A search."""

    recipe: Recipe
    """What every trial starts from: the path of a recipe, looked for in the study's folder, then in the working
    directory; or a recipe itself."""
    set: Annotated[dict[str, Any], AfterValidator(check_keys)] = {}
    """Dotted keys of the recipe -> values, for all trials. With another tuner.type or objective.type that section
    starts from its defaults, and steps take the place of epochs."""
    space: Annotated[Space, AfterValidator(check_space), AfterValidator(check_keys)]
    """Dotted keys of the recipe -> how they are drawn, for example
    tuner.rank: {choice: [4, 8, 16], when: {tuner.type: lora}}."""
    metric: StudyMetric | Annotated[list[StudyMetric], Field(min_length=1)]
    """What is best, each in its own direction: one metric, or several for a Pareto front. Measured at every look.
    Among several may be costs, known when a trial is through: adapter_bytes, the size of what is published;
    device_hours, of training it; inference_tflops, the 10^12 floating-point operations of drawing a picture as
    `evaluate` says. These are counted and not timed, so that they do not depend on what else a machine does; with them
    evaluate.steps may be in the space, for example {choice: [2, 4], when: {objective.type: consistency}}."""
    trials: Annotated[int, Field(ge=1, le=MOST_LISTED)] | None = None
    """At most so many. null: a grid's points; else as many as the budget is good for, but for the members of a
    population (pbt); else 16. A space with fewer configurations has fewer, since none is tried twice."""
    budget: Budget = Budget()
    scheduler: Scheduler = Field(default_factory=default_scheduler)
    """Which trials end early. Left out: asha for one metric, fifo for several."""
    searcher: Searcher = RandomSearch()
    """Which configurations are tried."""
    concurrency: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Trials that run at once. auto: as many as the cluster has room for."""
    pack: Annotated[int, Field(ge=2)] | Literal["auto", "off"] = "auto"
    """So many trials train in one forward pass of one process, a pack: those that differ only in LoRA rank, alpha,
    learning rate, schedule, seed and freeze depth. auto: as many as give the most trials an hour, which is measured
    when the study begins; off where that is less than a fifth more."""
    kinds: Literal["all", "auto"] = "all"
    """auto: of the values of tuner.type only those that are worth trials for so many images, as far from what the model
    draws as these are, and for so many trials (`gtl.search.strategy`). The study says which, and why."""
    transfer_rank: bool = False
    """Search at the space's smallest rank alone, then run every other rank once, to its end, with the configuration
    that was best there; trials are of the search, these come on top. The learning rate is carried as it is, and refused
    where it is known to move with the rank: with the usual random A, tuner.alpha has to be a number. random_b with
    alpha auto is taken, though on the built-in model its rate moved (tune_configs/rank_transfer.yaml)."""
    publish: Publish = Publish()
    confirm: Confirm = Confirm()

    @field_validator("pack", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: Any) -> Any:
        """YAML 1.1 reads off as false."""
        return "off" if value is False else value

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics, the first one first."""
        return (self.metric,) if isinstance(self.metric, str) else tuple(self.metric)

    @property
    def directions(self) -> dict[str, Literal["min", "max"]]:
        """Metric -> which way is better."""
        return {name: "max" if name in METRICS and METRICS[name].higher_is_better else "min" for name in self.metrics}

    @property
    def measured(self) -> tuple[str, ...]:
        """The metrics that a look at a trial measures: all but the costs."""
        return tuple(name for name in self.metrics if name not in COSTS)

    @property
    def num_points(self) -> int | None:
        """Configurations in the space; None: too many to count."""
        return count_points(self.space)

    @property
    def at_smallest_rank(self) -> "Study":
        """What is searched before the rate is carried; the study itself where it is not."""
        if not self.transfer_rank:
            return self
        ranks = self.space["tuner.rank"]
        smallest = Domain(choice=(min(ranks.bounds or ranks.values),))
        return self.model_copy(update={"transfer_rank": False, "space": {**self.space, "tuner.rank": smallest}})

    @property
    def num_trials(self) -> int:
        """Trials that are begun at most."""
        if self.transfer_rank:
            return self.at_smallest_rank.num_trials + (self.space["tuner.rank"].size or 1) - 1
        points, budget = self.num_points, self.budget
        asked = self.trials
        if asked is None and self.searcher.type == "grid":
            asked = points
        if asked is None:
            is_endless = budget != Budget() and self.scheduler.type != "pbt"  # whose members go on together
            asked = MOST if is_endless else TRIALS
        draws_again = self.searcher.type not in ("random", "grid") or self.scheduler.type == "pbt"
        return asked if points is None or draws_again else min(asked, points)

    @property
    def base(self) -> Recipe:
        """The recipe with what `set` says."""
        return self.recipe_of({})

    def configuration(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Of a trial's values those that are keys of the space and apply, in its order, numbers inside their ranges."""
        return applying(self.space, values)

    def recipe_of(self, values: Mapping[str, Any]) -> Recipe:
        """The checked recipe of a trial.

        Args:
            values: By keys of the space. What is no key of it, or does not apply, is left out.

        Raises:
            UserError: the recipe refuses a value, or its section.
        """
        changes = {**self.set, **self.configuration(values)}
        return parse(Recipe, over(self.recipe.model_dump(mode="json"), changes, "recipe"))

    @model_validator(mode="after")
    def _check_set(self) -> "Study":
        try:
            _ = self.base
        except UserError as error:
            raise UserError(f"set: {error}") from None
        for key in self.set:
            if drawn := next((other for other in self.space if f"{key}.".startswith(f"{other}.")), None):
                raise ValueError(f"set.{key}: trials have what space.{drawn} draws instead; leave one of the two out")
        return self

    @model_validator(mode="after")
    def _check_kinds(self) -> "Study":
        drawn = self.space.get("tuner.type")
        if self.kinds == "auto" and (drawn is None or not drawn.is_list):
            raise ValueError("kinds: auto: chooses among the values of space.tuner.type, which there is no list of")
        return self

    @model_validator(mode="after")
    def _check_number(self) -> "Study":
        points, budget = self.num_points, self.budget
        if self.searcher.type == "grid":
            if endless := [f"{key}: {domain.kind}" for key, domain in self.space.items() if domain.size is None]:
                raise ValueError(
                    f"space.{endless[0]}: a grid needs listed values or steps; take grid, quniform or randint, "
                    "or searcher.type: random"
                )
            if points and points > MOST and self.trials is None and budget == Budget():
                raise ValueError(
                    f"space: a grid of {points:,} points; say how many: trials, budget.hours or budget.gpu_hours"
                )
            if points and points > MOST_LISTED:
                raise ValueError(
                    f"space: a grid of {points:,} points: more than {MOST_LISTED:,} are not listed to draw trials "
                    "from; take searcher.type: random"
                )
        return self

    @model_validator(mode="after")
    def _check_parts(self) -> "Study":
        check_judged(self)
        check_fit(self)
        check_trials(self)
        check_looks(self)
        return self
