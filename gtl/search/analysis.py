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


@dataclass(frozen=True)
class Analysis:
    """Of one evaluation, worst first; empty where a score is of all pictures together, such as FID."""

    prompts: Mapping[str, float]
    """Prompts drawn worse than the mean -> the score of their pictures."""
    words: Mapping[str, float]
    """The same of words that several prompts have, and no more than half of them."""


def analyse(evaluation: Evaluation, metric: str) -> Analysis:
    """What of an evaluation's prompts fails by a metric of it."""
    pictures = scores_of(evaluation, metric)
    mean = evaluation.scores[metric].value
    sign = 1 if METRICS[metric].higher_is_better else -1

    def worse(values: Mapping[str, float]) -> dict[str, float]:
        return {
            each: value for each, value in sorted(values.items(), key=lambda pair: sign * pair[1])
            if sign * (mean - value) > EQUAL
        }  # fmt: skip

    of_word: dict[str, set[str]] = {}
    for prompt in dict(pictures):
        for word in words_of(prompt):
            of_word.setdefault(word, set()).add(prompt)
    number = len(dict(pictures))
    telling = {word for word, prompts in of_word.items() if 1 < len(prompts) <= number / 2}
    with_word = ((word, value) for prompt, value in pictures for word in words_of(prompt) if word in telling)
    return Analysis(worse(means(pictures)), worse(means(with_word)))


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


def words_of(prompt: str) -> set[str]:
    """Each once, without regard to capitals."""
    return set(re.findall(r"\w+", prompt.lower()))


def means(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Name -> the mean of its values."""
    values: dict[str, list[float]] = {}
    for name, value in pairs:
        values.setdefault(name, []).append(value)
    return {name: sum(each) / len(each) for name, each in values.items()}
