"""What an evaluation leaves behind, and how two of them compare."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from gtl import __version__
from gtl.adapters.card import Part
from gtl.config.templates import PLAIN
from gtl.report.evaluations import interval, rows_of
from gtl.report.text import columns
from gtl.types import UserError

if TYPE_CHECKING:
    from gtl.evaluate.estimate import Difference, Estimate


class Score(Part):
    """One metric's number, with what it depends on."""

    value: float
    parts: dict[str, float] = {}
    """What it is the mean of, by name, where each says something of its own."""
    low: float | None
    """Of the 95 % interval; None, like `high`, where none would be honest."""
    high: float | None
    higher_is_better: bool
    num_fake: int
    """Generated samples."""
    num_real: int | None
    """Real images; None where the score is not computed from any."""
    extractor: str
    """What made the features."""
    resize: str
    """How it sees pictures of another size."""
    dtype: str
    """Of the features."""
    note: str = ""
    fake: list[float]
    """Influence of each sample, from which differences of two evaluations get their intervals."""
    real: list[float] | None = None
    """Of each real image."""


class Sampling(Part):
    """How the samples were drawn."""

    prompts: list[str]
    """Sample i is of prompt i modulo their number, with seed `seed` + i."""
    negative_prompt: str
    seed: int
    steps: int
    guidance: float
    height: int
    width: int
    dtype: str
    template: str = PLAIN
    """What a prompt is drawn as, in place of the braces; it is judged by itself."""

    def prompts_of(self, number: int) -> list[str]:
        """Of so many samples, in their order."""
        return [self.prompts[i % len(self.prompts)] for i in range(number)]


class Copy(Part):
    """A sample and the training image that it is nearest to."""

    sample: int
    uri: str
    distance: float
    """Cosine distance of their features."""


class Evaluation(Part):
    """The scores of a model, with an adapter or without one."""

    schema_: int = Field(default=1, alias="schema")
    adapter: str | None
    """NAME@VERSION; None for the model alone."""
    step: int | None = None
    """Of a run with that name and version: the optimizer steps made; None: what it published."""
    base: dict[str, Any]
    """The model's source and fingerprint."""
    dataset: str
    """Hash of the real images that are compared with."""
    images: int
    """How many these are, of which so many are held out:"""
    held_out: int
    sampling: Sampling
    scores: dict[str, Score]
    nearest: list[Copy] = []
    """The samples that are nearest to images trained on, nearest first."""
    samples: str | None
    """URL of the folder of the samples; None where they were not kept."""
    code: str = __version__
    created: datetime.datetime = Field(default_factory=lambda: datetime.datetime.now(datetime.timezone.utc))

    @property
    def key(self) -> str:
        """Hash of what decides the scores: the same evaluation done again takes the place of the first."""
        decided = {
            "adapter": self.adapter, "base": self.base, "dataset": self.dataset, "sampling": self.sampling.model_dump(),
            "scores": {name: [score.extractor, score.num_real, score.num_fake] for name, score in self.scores.items()},
        }  # fmt: skip
        return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def title(self) -> str:
        """For people."""
        after = "" if self.step is None else f" after {self.step} steps"
        return f"{self.adapter or 'the model alone'}{after}"

    def to_json(self) -> bytes:
        """The bytes of the file."""
        return (json.dumps(self.model_dump(mode="json", by_alias=True), indent=1) + "\n").encode()


def make_score(estimate: Estimate, facts: Mapping[str, str], parts: Mapping[str, float] | None = None) -> Score:
    """The file's form of an estimate, with what its features come from."""
    real = None if estimate.real is None else estimate.real.tolist()
    return Score.model_validate({
        **estimate.facts(), **facts, "parts": parts or {}, "fake": estimate.fake.tolist(), "real": real,
    })  # fmt: skip


def estimate_of(name: str, score: Score) -> Estimate:
    """The estimate that a score was made of."""
    import torch

    from gtl.evaluate.estimate import Estimate

    real = None if score.real is None else torch.tensor(score.real, dtype=torch.float64)
    fake = torch.tensor(score.fake, dtype=torch.float64)
    return Estimate(name, score.value, score.low, score.high, fake, real, score.num_real, score.note)


def compare(first: Evaluation, second: Evaluation, besides: Collection[str] = ()) -> list[Difference]:
    """Of every metric that both have: the second less the first; `besides` names in what their sampling may differ.

    Raises:
        UserError: they were drawn in other ways, or compared with other images.
    """
    from gtl.evaluate.estimate import difference

    mine, theirs = ({**e.sampling.model_dump(), "dataset": e.dataset} for e in (first, second))
    if other := [key for key in mine if mine[key] != theirs[key] and key not in besides]:
        raise UserError(f"{first.title}, {second.title}: differ in {', '.join(other)}; evaluate both with one recipe")
    found = []
    for name, score in first.scores.items():
        if name in second.scores:
            one, two = estimate_of(name, second.scores[name]), estimate_of(name, score)
            if score.extractor == second.scores[name].extractor:
                found.append(difference(one, two))
    return found


def compare_by(metric: str, first: Evaluation, second: Evaluation, besides: Collection[str] = ()) -> Difference:
    """`compare` by one metric, beside which others may have been measured.

    Raises:
        UserError: as `compare`, or not both have the metric, by one extractor.
    """
    for found in compare(first, second, besides):
        if found.metric == metric:
            return found
    raise UserError(f"{first.title}, {second.title}: have no {metric} by one extractor; evaluate both with one recipe")


def table(evaluations: Sequence[Evaluation]) -> str:
    """The scores for a terminal, then how the other models differ from the first."""
    parts = [scores_table(evaluation) for evaluation in evaluations]
    parts += [differences_table(evaluations[0], other) for other in evaluations[1:]]
    return "\n\n".join(parts)


def scores_table(evaluation: Evaluation) -> str:
    """One model's scores, each with its interval and what it depends on."""
    scores = evaluation.scores.items()
    rows = [row for name, score in scores for row in rows_of(name, score.model_dump())]
    notes = [f"{name}: {score.note}" for name, score in scores if score.note]
    return "\n".join([evaluation.title, _columns_of(rows), *notes])


def differences_table(first: Evaluation, other: Evaluation) -> str:
    """What of another model's scores differs from the first's by more than chance explains."""
    return "\n".join([f"{other.title} less {first.title}", _columns_of(differences(first, other))])


def _columns_of(rows: Sequence[Mapping[str, str]]) -> str:
    return columns([list(rows[0]), *(list(row.values()) for row in rows)])


def differences(first: Evaluation, other: Evaluation) -> list[dict[str, str]]:
    """How another model's scores differ from the first's, a metric a row.

    Raises:
        UserError: they do not go together; see `compare`.
    """
    found = compare(first, other)
    if not found:
        raise UserError(f"{first.title}, {other.title}: have no metric in common")
    better = {None: "cannot be told", 0: other.title, 1: first.title}
    return [
        {"metric": one.metric, "difference": f"{one.value:+.4g}", "95 % interval": interval(one.low, one.high),
         "better": better[one.better]}
        for one in found
    ]  # fmt: skip


def differences_of_files(first: dict[str, Any], other: dict[str, Any]) -> list[dict[str, str]]:
    """`differences` of what was read from two files of evaluations."""
    return differences(Evaluation.model_validate(first), Evaluation.model_validate(other))
