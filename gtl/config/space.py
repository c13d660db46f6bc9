"""The space of a study: how each of its keys is drawn, and which keys apply together."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, model_serializer, model_validator

from gtl.config.base import Section

Bounds = TypeVar("Bounds", bound=tuple[float, ...])

MOST_NAMED = 1000
"""Values of a key that decides whether others apply: what such keys are together is gone through one by one."""

EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
"""A number that YAML 1.1 takes for text, for want of a point or of a sign: 1e-4."""


def read_numbers(values: Any) -> Any:
    """Numbers written as 1e-4, which the fields of a recipe read as numbers, too."""
    if not isinstance(values, list | tuple):
        return values
    return [float(v) if isinstance(v, str) and EXPONENT.fullmatch(v) else v for v in values]


def check_distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Refuse a value that is given twice: its trials would be the same."""
    if len({repr(value) for value in values}) < len(values):
        raise ValueError("should have each value once")
    return values


def check_bounds(bounds: Bounds) -> Bounds:
    """Refuse a range that holds nothing, and a step that does not lead from one end to the other."""
    low, high, *step = bounds
    if low >= high:
        raise ValueError("should be [lowest, highest], the smaller one first")
    if step and step[0] <= 0:
        raise ValueError("should have a step above 0, as the last of three")
    if step and not math.isfinite((high - low) / step[0]):
        raise ValueError("should have a larger step: there are more values than a number can say")
    if step and not math.isclose((high - low) / step[0], round((high - low) / step[0]), rel_tol=1e-9):
        raise ValueError("should have a step that goes into highest - lowest a whole number of times")
    return bounds


def check_positive(bounds: Bounds) -> Bounds:
    """Refuse a range without a logarithm."""
    if bounds[0] <= 0:
        raise ValueError("should begin above 0, since it is drawn by its logarithm")
    if not math.isfinite(bounds[1] / bounds[0]):
        raise ValueError("should be narrower: highest / lowest is more than a number can be")
    return bounds


Values = Annotated[tuple[Any, ...], Field(min_length=1), BeforeValidator(read_numbers), AfterValidator(check_distinct)]
Range = Annotated[tuple[float, float], AfterValidator(check_bounds)]
SteppedRange = Annotated[tuple[float, float, float], AfterValidator(check_bounds)]
IntRange = Annotated[tuple[int, int], AfterValidator(check_bounds)]
SteppedIntRange = Annotated[tuple[int, int, int], AfterValidator(check_bounds)]


class Domain(Section):
    """How one key of the recipe is drawn: exactly one of these, and when."""

    grid: Values | None = None
    """Every value equally often."""
    choice: Values | None = None
    """One of these, all alike."""
    uniform: Range | None = None
    """[lowest, highest]."""
    loguniform: Annotated[Range, AfterValidator(check_positive)] | None = None
    """[lowest, highest], with the same chance in every decade."""
    quniform: SteppedRange | None = None
    """[lowest, highest, step]: both ends, and steps between them."""
    qloguniform: Annotated[SteppedRange, AfterValidator(check_positive)] | None = None
    """The same, rounded from what loguniform draws."""
    randint: IntRange | None = None
    """[lowest, highest], whole numbers, both ends among them."""
    qrandint: SteppedIntRange | None = None
    """[lowest, highest, step], whole numbers, both ends among them."""
    when: dict[str, Any] = {}
    """Other keys of the space -> the value, or a list of values, at which this key applies. Else it is left out."""

    @model_validator(mode="after")
    def _check_kind(self) -> "Domain":
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"should have one of {', '.join(KINDS)}; found {found}")
        return self

    @model_serializer
    def _given(self) -> dict[str, Any]:
        drawn = {self.kind: list(getattr(self, self.kind))}
        return {**drawn, "when": self.when} if self.when else drawn

    @property
    def kind(self) -> str:
        """Which one of them."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Lowest and highest of a range; None of a list."""
        return None if self.is_list else getattr(self, self.kind)[:2]

    @property
    def step(self) -> float | None:
        """Distance of neighbours in a range; None where there are none."""
        if self.kind == "randint":
            return 1
        return getattr(self, self.kind)[2] if self.kind.startswith("q") else None

    @property
    def is_list(self) -> bool:
        """Whether the values are listed."""
        return self.kind in ("grid", "choice")

    @property
    def is_log(self) -> bool:
        """Whether the logarithm is drawn."""
        return self.kind.endswith("loguniform")

    @property
    def is_integer(self) -> bool:
        """Whether a range has whole numbers only."""
        return self.kind.endswith("randint")

    @property
    def size(self) -> int | None:
        """How many values there are; None: too many to count."""
        if self.is_list:
            return len(getattr(self, self.kind))
        if self.bounds is None or self.step is None:
            return None
        return round((self.bounds[1] - self.bounds[0]) / self.step) + 1

    @property
    def values(self) -> Sequence[Any]:
        """All of them.

        Raises:
            ValueError: they are too many to count.
        """
        if self.is_list:
            return getattr(self, self.kind)
        if self.size is None:
            raise ValueError(f"{self.kind} has no list of values")
        return [self._on_step(position) for position in range(self.size)]

    @property
    def probes(self) -> Sequence[Any]:
        """What stands for all of them in a check: every listed one; both ends of a range and one between."""
        if self.bounds is None:
            return self.values
        return list(dict.fromkeys([self.snap(self.bounds[0]), self.at(0.382), self.snap(self.bounds[1])]))

    def at(self, share: float) -> Any:
        """The value that so large a share of all draws is below: of a number drawn evenly from [0, 1), a draw."""
        if self.bounds is None:
            return self.values[int(share * len(self.values))]
        low, high = self.bounds
        if self.step is not None and not self.is_log:
            return self._on_step(int(share * (self.size or 1)))  # of billions, one
        drawn = low * (high / low) ** share if self.is_log else low + share * (high - low)
        return self.snap(drawn)

    def snap(self, number: Any) -> Any:
        """The value of a range that is nearest to a number; what is listed, as it is."""
        if self.bounds is None:
            return number
        low, high = self.bounds
        inside = min(max(float(number), low), high)
        return inside if self.step is None else self._on_step(round((inside - low) / self.step))

    def _on_step(self, position: int) -> Any:
        assert self.bounds is not None and self.step is not None
        value = self.bounds[0] + position * self.step
        return int(value) if self.is_integer else float(f"{value:.12g}")  # 0.6, not 0.6000000000000001


KINDS: tuple[str, ...] = tuple(name for name in Domain.model_fields if name != "when")
Space = dict[str, Domain]
"""Dotted key of the recipe -> how it is drawn, in the file's order."""


def check_space(space: Space) -> Space:
    """Refuse what is wrong with keys among themselves.

    Raises:
        ValueError: names the key.
    """
    if not space:
        raise ValueError(
            "there is nothing to search; give keys, such as train.learning_rate: {loguniform: [1e-5, 1e-2]}"
        )
    for key, domain in space.items():
        for outer in space:
            if key.startswith(f"{outer}."):
                raise ValueError(f"{key}: is inside {outer}, which is drawn whole; leave one of the two out")
        for parent, wanted in domain.when.items():
            check_condition(space, key, parent, wanted)
    return space


def check_condition(space: Space, key: str, parent: str, wanted: Any) -> None:
    """Refuse a condition that nothing can meet, or that nothing decides.

    Raises:
        ValueError: names the key.
    """
    where = f"{key}.when.{parent}"
    if parent not in space:
        raise ValueError(f"{where}: is no key of this space, so nothing decides it; there are {', '.join(space)}")
    if (space[parent].size or math.inf) > MOST_NAMED:
        raise ValueError(f"{where}: has more values than can be named; give it choice, grid or a step")
    if not alternatives(wanted):
        raise ValueError(f"{where}: []: never is; it is {', '.join(map(label, space[parent].values))}")
    for value in alternatives(wanted):
        if value not in space[parent].values:
            raise ValueError(f"{where}: {value!r}: never is; it is {', '.join(map(label, space[parent].values))}")
    if key in ancestors(space, key):
        raise ValueError(f"{where}: depends on {key} itself")


def ancestors(space: Space, key: str) -> set[str]:
    """The keys that decide whether this one applies, directly or not."""
    found: set[str] = set()
    waiting = [key]
    while waiting:
        new = [parent for parent in space[waiting.pop()].when if parent in space and parent not in found]
        found.update(new)
        waiting += new
    return found


def alternatives(wanted: Any) -> list[Any]:
    """The values of a condition."""
    return wanted if isinstance(wanted, list) else [wanted]


def label(value: Any) -> str:
    """A value as a YAML file would have it, in one line."""
    return value if isinstance(value, str) else json.dumps(value, default=str)  # YAML has dates, too


def applies(space: Space, key: str, values: Mapping[str, Any]) -> bool:
    """Whether a key is part of the configuration that has these values."""
    return all(
        parent in values and values[parent] in alternatives(wanted) and applies(space, parent, values)
        for parent, wanted in space[key].when.items()
    )


def applying(space: Space, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of those keys that are part of the configuration, in the space's order, on the steps of ranges."""
    found = {key: values[key] for key in space if key in values}
    on_steps = {key: value if value is None else space[key].snap(value) for key, value in found.items()}
    return {key: value for key, value in on_steps.items() if applies(space, key, on_steps)}


def parents_first(space: Space) -> list[str]:
    """The keys in an order in which each is behind those that decide whether it applies."""
    return sorted(space, key=lambda key: len(ancestors(space, key)))


def points(space: Space) -> Iterator[dict[str, Any]]:
    """Every configuration of a space of lists and steps, each once; the first keys change most slowly.

    Raises:
        ValueError: a range has more values than can be counted.
    """

    def extend(chosen: dict[str, Any], rest: list[str]) -> Iterator[dict[str, Any]]:
        if not rest:
            yield applying(space, chosen)
        elif applies(space, rest[0], chosen):
            for value in space[rest[0]].values:
                yield from extend({**chosen, rest[0]: value}, rest[1:])
        else:
            yield from extend(chosen, rest[1:])

    return extend({}, parents_first(space))


def count_points(space: Space) -> int | None:
    """How many configurations there are; None: too many to count."""
    if any(domain.size is None for domain in space.values()):
        return None
    deciding = {parent for domain in space.values() for parent in domain.when}
    decided = {key: domain for key, domain in space.items() if key in deciding}
    free = [key for key in space if key not in deciding]
    return sum(
        math.prod(space[key].size or 1 for key in free if applies(space, key, chosen)) for chosen in points(decided)
    )
