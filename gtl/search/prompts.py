"""The best wording of prompts: templates that are drawn with, scored, and made longer where that helps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gtl.config.metrics import METRICS, of_pictures
from gtl.config.templates import PLAIN, Templates
from gtl.evaluate.result import Evaluation, compare
from gtl.evaluate.run import evaluate
from gtl.report.chart import short
from gtl.report.evaluations import interval
from gtl.report.text import columns
from gtl.search.study import FRESH
from gtl.types import Progress, UserError, quiet

if TYPE_CHECKING:
    from gtl.config import Recipe
    from gtl.evaluate.estimate import Difference

KEPT = 2
"""Templates of a round that the next one goes on from."""


@dataclass(frozen=True)
class Found:
    """What a search came to."""

    metric: str
    tried: Mapping[str, Evaluation]
    """By template, best first."""
    again: Difference
    """The best template less the plain prompts, both drawn once more on fresh seeds."""
    failing: tuple[str, ...]
    """Prompts that are drawn worst as they are, worst first; () of metrics that are of all pictures together."""

    @property
    def best(self) -> str:
        """The template that drew best."""
        return next(iter(self.tried))


def search_prompts(
    recipe: Recipe, adapters: Sequence[str] = (), templates: Templates | None = None, metric: str | None = None, *,
    tries: int = 12, progress: Progress = quiet,
) -> Found:  # fmt: skip
    """Draw the recipe's prompts in other words, and find those that score best.

    All templates are drawn first. Then each of the best gets each addition, and so on while that is better. Templates
    were chosen for what they scored, so the best is drawn again on fresh seeds, beside the plain prompts.

    Args:
        recipe: Its `evaluate` says which prompts, how they are drawn and what they are compared with.
        adapters: NAME[@VERSION|@ALIAS][:SCALE] that are active at once; none: the model alone.
        templates: None: some for photographs.
        metric: Of pictures; None: the first of the recipe's.
        tries: Templates to try.
        progress: Is called as it goes on.

    Raises:
        UserError: the metric is none of pictures, there are more templates than tries, or as for
            `gtl.evaluate.run.evaluate`.
    """
    given = templates or Templates()
    metric = metric or recipe.evaluate.metrics[0]
    if metric not in (known := of_pictures(METRICS)):
        raise UserError(f"--metric: {metric}: is not of pictures; expected one of {', '.join(known)}")
    first = list(dict.fromkeys([PLAIN, *given.templates]))
    if tries < len(first):
        raise UserError(f"--tries: {tries}: expected at least {len(first)}, one for each template")
    asked = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"metrics": [metric]})})
    sign, tried, ahead = 1 if METRICS[metric].higher_is_better else -1, dict[str, Evaluation](), first

    def gain(template: str) -> float:
        return sign * tried[template].scores[metric].value

    while ahead:
        before = max(map(gain, tried), default=float("-inf"))
        tried |= zip(ahead, evaluate(asked, [list(adapters)], templates=ahead, progress=progress), strict=True)
        best = sorted(tried, key=gain, reverse=True)[:KEPT]
        if gain(best[0]) <= before:
            break
        ahead = longer(best, given.additions, tried)[: tries - len(tried)]
    order = sorted(tried, key=gain, reverse=True)
    fresh = asked.evaluate.model_copy(update={"seed": asked.evaluate.seed + FRESH})
    plain, chosen = evaluate(
        asked.model_copy(update={"evaluate": fresh}), [list(adapters)], templates=[PLAIN, order[0]], progress=progress
    )
    (difference,) = compare(plain, chosen, besides=("template",))
    return Found(metric, {each: tried[each] for each in order}, difference, failing(tried[PLAIN], metric))


def longer(best: Sequence[str], additions: Sequence[str], known: Mapping[str, object]) -> list[str]:
    """The templates with an addition more that they have not yet, each once; in turn, so that none takes all tries."""
    found = [f"{template}{addition}" for addition in additions for template in best if addition not in template]
    return [each for each in dict.fromkeys(found) if each not in known]


def failing(plain: Evaluation, metric: str) -> tuple[str, ...]:
    """Prompts whose pictures lower the score, by how much they do; of scores to which each picture adds by itself."""
    score = plain.scores[metric]
    if score.real is not None:
        return ()
    prompts = plain.sampling.prompts_of(len(score.fake))
    middle = sum(score.fake) / len(score.fake)
    sums: dict[str, list[float]] = {}
    for prompt, value in zip(prompts, score.fake, strict=True):
        sums.setdefault(prompt, []).append(value - middle)
    means = {prompt: sum(values) / len(values) for prompt, values in sums.items()}
    sign = 1 if METRICS[metric].higher_is_better else -1
    return tuple(sorted((prompt for prompt in means if sign * means[prompt] < 0), key=lambda each: sign * means[each]))


def table(found: Found) -> str:
    """What was tried, best first, which prompts fail, and how sure the best is."""
    rows = [["template", found.metric, "95 % interval"]]
    for template, evaluation in found.tried.items():
        score = evaluation.scores[found.metric]
        rows.append([template, short(score.value), interval(score.low, score.high)])
    verdict = {None: "cannot be told from them", 0: "better", 1: "worse"}[found.again.better]
    lines = [columns(rows), ""]
    if found.failing:
        lines.append(f"drawn worst as they are: {'; '.join(found.failing[:3])}")
    value = f"{found.again.value:+.3g} ({interval(found.again.low, found.again.high)})"
    return "\n".join([*lines, f"{value} against the plain prompts on fresh seeds: {verdict}"])
