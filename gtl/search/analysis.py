"""What fails of a task: prompts, and words of them, whose pictures lower a score."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gtl.config.metrics import METRICS

if TYPE_CHECKING:
    from gtl.evaluate.result import Evaluation

EQUAL = 1e-9
"""Means that differ by less are the same: what is left is rounding."""
FEWEST = 8
"""Pictures of a word; of fewer a mean says little."""


@dataclass(frozen=True)
class Analysis:
    """What is drawn worse than the mean of an evaluation, worst first.

    Empty where all is drawn alike, and where a score is of all pictures together, such as FID.
    """

    prompts: Mapping[str, float]
    """Prompt -> the score of its pictures."""
    words: Mapping[str, float]
    """The same of words that several prompts have, and no more than half of them."""


def analyse(evaluation: Evaluation, metric: str) -> Analysis:
    """What of an evaluation's prompts is drawn worst by a metric of it."""
    pictures = scores_of(evaluation, metric)
    mean, sign = evaluation.scores[metric].value, METRICS[metric].sign

    def worse(values: Mapping[str, list[float]], fewest: int = 1) -> dict[str, float]:
        means = {name: sum(each) / len(each) for name, each in values.items() if len(each) >= fewest}
        ordered = sorted(means, key=lambda name: sign * means[name])
        return {name: means[name] for name in ordered if sign * (mean - means[name]) > EQUAL}

    by_prompt = grouped(pictures)
    having = {word: [prompt for prompt in by_prompt if word in words_of(prompt)] for word in words_in(by_prompt)}
    by_word = {
        word: [value for prompt in prompts for value in by_prompt[prompt]]
        for word, prompts in having.items() if 1 < len(prompts) <= len(by_prompt) / 2
    }  # fmt: skip
    return Analysis(worse(by_prompt), worse(by_word, FEWEST))


def score_on(evaluation: Evaluation, metric: str, prompts: Iterable[str]) -> float:
    """The score of pictures of some prompts alone."""
    wanted = set(prompts)
    found = [value for prompt, value in scores_of(evaluation, metric) if prompt in wanted]
    return sum(found) / len(found)


def scores_of(evaluation: Evaluation, metric: str) -> list[tuple[str, float]]:
    """(prompt, score) of each picture, whose mean is the metric; [] where it is of all of them together."""
    score = evaluation.scores[metric]
    if not METRICS[metric].of_each:
        return []
    prompts, middle = evaluation.sampling.prompts_of(len(score.fake)), sum(score.fake) / len(score.fake)
    return [(prompt, score.value + influence - middle) for prompt, influence in zip(prompts, score.fake, strict=True)]


def words_of(text: str) -> set[str]:
    """Each once, without regard to capitals."""
    return set(re.findall(r"\w+", text.lower()))


def words_in(prompts: Iterable[str]) -> list[str]:
    """All words of some prompts, in the order of the alphabet."""
    return sorted({word for prompt in prompts for word in words_of(prompt)})


def grouped(pairs: Iterable[tuple[str, float]]) -> dict[str, list[float]]:
    """Name -> its values."""
    values: dict[str, list[float]] = {}
    for name, value in pairs:
        values.setdefault(name, []).append(value)
    return values
