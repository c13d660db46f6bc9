"""How a study searches: which configurations come next (the searcher) and which trials end early (the scheduler)."""

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag

from gtl.config.base import Section, type_of

Reduction = Annotated[float, Field(gt=1)]


class Asha(Section):
    """Asynchronous successive halving (Li et al. 2020, arXiv 1810.05934): stop whatever is behind at a rung.

    Rungs are at grace_period, grace_period * reduction_factor and so on, in optimizer steps; none is in the second half
    of a run, where stopping saves little. A trial goes on at one if it is among the best 1 / reduction_factor of those
    that were there before it, so nobody waits for anybody.

    The defaults are for fine-tuning. Rates that are too high show in the first tenth of a run, while ranks and freeze
    depths part late, and a look at few pictures is noisy: so there are two rungs, at a ninth and a third, and of 9
    trials 3 pass each instead of Ray's 1 of 4. One bracket: others only leave out rungs, and the paper found none
    better than the one that stops most (section 4.1).
    """

    type: Literal["asha"] = "asha"
    grace_period: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Steps before any trial is stopped. auto: the look (evaluate.every) nearest to a ninth of the longest run (with
    another reduction_factor: 1 / its square), and none in the warm-up."""
    reduction_factor: Reduction = 3
    """One in so many passes a rung."""
    brackets: Annotated[int, Field(ge=1)] = 1
    """Trials are spread over so many sets of rungs, each without the first rung of the one before."""
    stops: ClassVar[bool] = True


class Fifo(Section):
    """Every trial runs to its end: nothing is lost by a wrong guess, and several metrics can be weighed."""

    type: Literal["fifo"] = "fifo"
    stops: ClassVar[bool] = False


class HyperBand(Section):
    """HyperBand (Li et al. 2018, arXiv 1603.06560): brackets from many short trials to few long ones, each halved when
    all of its trials have come to a rung. They wait for each other; take it where trials take about equally long and
    it is not known how early the good ones show. Rungs are counted in looks (evaluate.every)."""

    type: Literal["hyperband"] = "hyperband"
    reduction_factor: Reduction = 3
    """One in so many passes a rung."""
    stops: ClassVar[bool] = True


class BohbBands(Section):
    """HyperBand as BOHB needs it (Falkner et al. 2018, arXiv 1807.01774); goes with searcher.type: bohb."""

    type: Literal["bohb"] = "bohb"
    reduction_factor: Reduction = 3
    """One in so many passes a rung."""
    stops: ClassVar[bool] = True


def check_factors(factors: tuple[float, float]) -> tuple[float, float]:
    """Refuse factors that go in one direction only."""
    if not factors[0] < 1 < factors[1]:
        raise ValueError("should be [below 1, above 1]")
    return factors


class Pbt(Section):
    """Population based training (Jaderberg et al. 2017, arXiv 1711.09846): a poor trial takes over the weights of a
    good one, and its values, changed a little. What comes out is a schedule, not a setting.

    It changes values in the middle of a run, so the space has only keys that the weights do not depend on. Small
    changes often are better than large ones: a fine-tuning run is short, and a rate that jumps undoes what was learned.
    """

    type: Literal["pbt"] = "pbt"
    interval: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Steps between two exchanges. auto: an eighth of the longest run, and at least one look (evaluate.every)."""
    quantile: Annotated[float, Field(gt=0, le=0.5)] = 0.25
    """Share of the trials that is poor, and share that is good."""
    resample: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Chance that a value is drawn anew instead of changed a little."""
    factors: Annotated[
        tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]], AfterValidator(check_factors)
    ] = (0.8, 1.25)
    """A number is multiplied by one of these; a listed value moves to a neighbour. The result stays in the space."""
    stops: ClassVar[bool] = False


Scheduler = Annotated[
    Annotated[Asha, Tag("asha")] | Annotated[Fifo, Tag("fifo")] | Annotated[HyperBand, Tag("hyperband")]
    | Annotated[BohbBands, Tag("bohb")] | Annotated[Pbt, Tag("pbt")],
    Discriminator(type_of("asha")),
]  # fmt: skip

Seed = Annotated[int, Field(ge=0, lt=2**32)]


class RandomSearch(Section):
    """Independent draws (Bergstra & Bengio 2012): hard to beat for as many trials as two or three keys need.

    A trial's draw depends on the seed and its number alone: more trials go on where fewer ended.
    """

    type: Literal["random"] = "random"
    seed: Seed = 0


class GridSearch(Section):
    """Every configuration of the space once; in an order that the seed draws when not all may be reached."""

    type: Literal["grid"] = "grid"
    seed: Seed = 0


class OptunaSearch(Section):
    """Tree-structured Parzen estimators over all keys together (Bergstra et al. 2011; Watanabe 2023, arXiv 2304.11127),
    for one metric or several. Needs Optuna: gtl[search]."""

    type: Literal["optuna"] = "optuna"
    seed: Seed = 0
    startup: Annotated[int, Field(ge=1)] = 8
    """Trials that are drawn at random first. Optuna's own 10 would be most of a study of 16."""


class HyperoptSearch(Section):
    """HyperOpt's tree-structured Parzen estimators, key by key. Needs the package hyperopt."""

    type: Literal["hyperopt"] = "hyperopt"
    seed: Seed = 0
    startup: Annotated[int, Field(ge=1)] = 8
    """Trials that are drawn at random first."""


class BohbSearch(Section):
    """BOHB's density model (Falkner et al. 2018, arXiv 1807.01774); goes with scheduler.type: bohb. Needs the packages
    hpbandster and ConfigSpace."""

    type: Literal["bohb"] = "bohb"
    seed: Seed = 0


Searcher = Annotated[
    Annotated[RandomSearch, Tag("random")] | Annotated[GridSearch, Tag("grid")]
    | Annotated[OptunaSearch, Tag("optuna")] | Annotated[HyperoptSearch, Tag("hyperopt")]
    | Annotated[BohbSearch, Tag("bohb")],
    Discriminator(type_of("random")),
]  # fmt: skip
