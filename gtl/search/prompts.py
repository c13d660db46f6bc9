"""The best wording of prompts: templates that are drawn with, scored, and changed by what fails."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

from gtl.backbones.language import check_language
from gtl.config.base import absolute_if_local
from gtl.config.metrics import METRICS, of_pictures
from gtl.config.templates import PLAIN, Templates
from gtl.evaluate.result import Evaluation, compare_by
from gtl.evaluate.run import check, evaluate
from gtl.report.chart import short
from gtl.report.evaluations import interval
from gtl.report.text import columns
from gtl.search.analysis import Analysis, analyse, score_on, words_of
from gtl.search.study import FRESH
from gtl.search.writing import write_templates
from gtl.session import session
from gtl.types import Progress, UserError, quiet

if TYPE_CHECKING:
    from gtl.config import Recipe
    from gtl.evaluate.estimate import Difference

LEAST_ROUND = 4
"""Templates of a round, where there are tries left for so many; else as many as were given to begin with."""
TOLD = 4
"""Of what fails, in the table."""


@dataclass(frozen=True)
class Found:
    """What a search came to."""

    metric: str
    tried: Mapping[str, Evaluation]
    """By template, best first."""
    again: Difference | None
    """The best template less the plain prompts, both drawn once more on fresh seeds; None: these are the best."""
    written: tuple[str, ...] | None = None
    """Of those tried what a language model wrote; None: nobody was asked."""

    @property
    def best(self) -> str:
        """The template that drew best."""
        return next(iter(self.tried))

    def fails(self, template: str) -> Analysis:
        """What is drawn worse than the mean in a template."""
        return analyse(self.tried[template], self.metric)


def search_prompts(
    recipe: Recipe, adapters: Sequence[str] = (), templates: Templates | None = None, metric: str | None = None, *,
    tries: int = 12, writer: str | None = None, progress: Progress = quiet,
) -> Found:  # fmt: skip
    """Draw the recipe's prompts in other words, and find those that score best.

    All templates are drawn first. From then on the best one's pictures say which prompts fail. The template that draws
    those best (as in GEPA, Agrawal et al. 2025, arXiv 2507.19457) is put into the best one and the other way about,
    both get each addition, and a language model may write more, a round at a time until the tries are used or nothing
    is left. Templates were chosen for what they scored, so the best is drawn again on fresh seeds, beside the plain
    prompts.

    Args:
        recipe: Its `evaluate` says which prompts, how they are drawn and what they are compared with.
        adapters: NAME[@VERSION|@ALIAS][:SCALE] that are active at once; none: the model alone.
        templates: None: some for photographs.
        metric: Of pictures; None: the first of the recipe's.
        tries: Templates to try.
        writer: A folder or hub id of a language model, which is told what fails and writes up to half of what is tried
            after the first round; None: nobody does.
        progress: Is called as it goes on.

    Raises:
        UserError: the metric is none of pictures, there are more templates than tries, the writer is none or cannot
            answer, or as for `gtl.evaluate.run.evaluate`.
    """
    given = templates or Templates()
    metric = metric or recipe.evaluate.metrics[0]
    if metric not in (known := of_pictures(METRICS)):
        raise UserError(f"--metric: {metric}: is not of pictures; expected one of {', '.join(known)}")
    ahead = list(dict.fromkeys([PLAIN, *given.templates]))
    if tries < len(ahead):
        raise UserError(f"--tries: {tries}: expected at least {len(ahead)}, one for each template")
    asked = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"metrics": [metric]})})
    check(asked)
    if writer is not None:
        if tries == len(ahead):
            raise UserError(f"--tries: {tries}: the templates take them all; expected more, for --writer")
        writer = absolute_if_local(writer)
        check_language(writer)
    most, tried, written = max(LEAST_ROUND, len(ahead)), dict[str, Evaluation](), list[str]()

    def gain(template: str) -> float:
        return METRICS[metric].sign * tried[template].scores[metric].value

    with session():
        while ahead:
            tried |= zip(ahead, evaluate(asked, [list(adapters)], templates=ahead, progress=progress), strict=True)
            best = max(tried, key=gain)
            room = min(most, tries - len(tried))
            ahead = longer([best, beside(best, tried, metric)], given.additions, tried)
            if writer is not None and room:
                values = {template: found.scores[metric].value for template, found in tried.items()}
                fails, prompts = analyse(tried[best], metric), tried[best].sampling.prompts
                # Seeds go on with what was tried, so that each round hears other words.
                new = write_templates(writer, metric, values, fails, prompts, room, len(tried), progress)
                ahead, written = in_turn(new, ahead), [*written, *new]
            ahead = ahead[:room]
        order = sorted(tried, key=gain, reverse=True)
        again = None if order[0] == PLAIN else confirm(asked, adapters, order[0], metric, progress)
    drawn = None if writer is None else tuple(each for each in dict.fromkeys(written) if each in tried)
    return Found(metric, {each: tried[each] for each in order}, again, drawn)


def confirm(recipe: Recipe, adapters: Sequence[str], template: str, metric: str, progress: Progress) -> Difference:
    """A template less the plain prompts, both drawn on fresh seeds."""
    asked = recipe.evaluate
    fresh = recipe.model_copy(update={"evaluate": asked.model_copy(update={"seed": asked.seed + FRESH})})
    plain, chosen = evaluate(fresh, [list(adapters)], templates=[PLAIN, template], progress=progress)
    return compare_by(metric, plain, chosen, besides=("template",))


def beside(best: str, tried: Mapping[str, Evaluation], metric: str) -> str:
    """Whom to go on from beside the best: of the others the one that draws best what the best fails at.

    Where nothing is known to fail, as of a metric of all pictures together, the next best.
    """
    failing, sign = analyse(tried[best], metric).prompts, METRICS[metric].sign

    def gains(template: str) -> tuple[float, float]:
        found = tried[template]
        overall = found.scores[metric].value
        return sign * (score_on(found, metric, failing) if failing else overall), sign * overall

    return max((template for template in tried if template != best), key=gains, default=best)


def longer(parents: Sequence[str], additions: Sequence[str], known: Collection[str]) -> list[str]:
    """Each of two templates in the other one, then both with an addition more, as far as they do not have that yet.

    In turn, so that none takes all tries.
    """
    first, second = parents
    found = []
    if not has(first, second) and not has(second, first):
        found += [first.replace(PLAIN, second), second.replace(PLAIN, first)]
    found += [f"{template}{addition}" for addition in additions for template in parents if not has(template, addition)]
    return [each for each in dict.fromkeys(found) if each not in known]


def has(template: str, other: str) -> bool:
    """Whether all words of another template or addition are in a template; of one without words, all of its marks."""
    words = words_of(other)
    return words <= words_of(template) if words or other == PLAIN else other in template


def in_turn(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """One of each, as long as there are any; each once."""
    pairs = zip_longest(first, second)
    return list(dict.fromkeys(each for pair in pairs for each in pair if each is not None))


def table(found: Found) -> str:
    """What was tried, best first, what fails, and how sure the best is."""
    rows = [["template", found.metric, "95 % interval"]]
    for template, evaluation in found.tried.items():
        score = evaluation.scores[found.metric]
        rows.append([template, short(score.value), interval(score.low, score.high)])
    lines = [columns(rows), ""]
    for template in dict.fromkeys([PLAIN, found.best]):
        fails = found.fails(template)
        for kind, values in {"prompts": fails.prompts, "words": fails.words}.items():
            if values:
                worst = "; ".join(f"{name} {short(value)}" for name, value in list(values.items())[:TOLD])
                lines.append(f"{kind} drawn worst as {template}: {worst}")
    if found.written is not None:
        lines.append(f"written by the language model: {'; '.join(found.written) or 'nothing of use'}")
    return "\n".join([*lines, verdict(found.again)])


def verdict(again: Difference | None) -> str:
    """How sure the best is, in a line."""
    if again is None:
        return "none is better than the plain prompts"
    words = {None: "cannot be told from them", 0: "better", 1: "worse"}[again.better]
    return f"{again.value:+.3g} ({interval(again.low, again.high)}) against the plain prompts on fresh seeds: {words}"
