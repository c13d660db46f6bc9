"""The best wording of prompts: templates that are drawn with, scored, and changed by what fails."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

from gtl.backbones.language import find_language
from gtl.config.metrics import METRICS, of_pictures
from gtl.config.templates import PLAIN, Templates
from gtl.evaluate.result import Evaluation, compare_by
from gtl.evaluate.run import evaluate
from gtl.report.chart import short
from gtl.report.evaluations import interval
from gtl.report.text import columns
from gtl.search.analysis import Analysis, analyse, score_on
from gtl.search.study import FRESH
from gtl.search.writing import write_templates
from gtl.session import session
from gtl.types import Progress, UserError, quiet

if TYPE_CHECKING:
    from gtl.config import Recipe
    from gtl.evaluate.estimate import Difference

TOLD = 4
"""Of what fails, in the table."""


@dataclass(frozen=True)
class Found:
    """What a search came to."""

    metric: str
    tried: Mapping[str, Evaluation]
    """By template, best first."""
    again: Difference
    """The best template less the plain prompts, both drawn once more on fresh seeds."""
    written: tuple[str, ...] = ()
    """Templates that a language model wrote, of those tried."""

    @property
    def best(self) -> str:
        """The template that drew best."""
        return next(iter(self.tried))

    def fails(self, template: str) -> Analysis:
        """What is drawn worst in a template."""
        return analyse(self.tried[template], self.metric)


def search_prompts(
    recipe: Recipe, adapters: Sequence[str] = (), templates: Templates | None = None, metric: str | None = None, *,
    tries: int = 12, writer: str | None = None, progress: Progress = quiet,
) -> Found:  # fmt: skip
    """Draw the recipe's prompts in other words, and find those that score best.

    All templates are drawn first. From then on the best one's pictures say which prompts fail. The template that draws
    those best (as in GEPA, Agrawal et al. 2025, arXiv 2507.19457) is put into the best one and the other way about,
    both get each addition, a language model may write more, and so on while that is better. Templates were chosen for
    what they scored, so the best is drawn again on fresh seeds, beside the plain prompts.

    Args:
        recipe: Its `evaluate` says which prompts, how they are drawn and what they are compared with.
        adapters: NAME[@VERSION|@ALIAS][:SCALE] that are active at once; none: the model alone.
        templates: None: some for photographs.
        metric: Of pictures; None: the first of the recipe's.
        tries: Templates to try.
        writer: A folder or hub id of a language model, which is told what fails and writes half of what is tried after
            the first round; None: nobody does.
        progress: Is called as it goes on.

    Raises:
        UserError: the metric is none of pictures, there are more templates than tries, the writer is none, or as for
            `gtl.evaluate.run.evaluate`.
    """
    given = templates or Templates()
    metric = metric or recipe.evaluate.metrics[0]
    if metric not in (known := of_pictures(METRICS)):
        raise UserError(f"--metric: {metric}: is not of pictures; expected one of {', '.join(known)}")
    ahead = list(dict.fromkeys([PLAIN, *given.templates]))
    if tries < len(ahead):
        raise UserError(f"--tries: {tries}: expected at least {len(ahead)}, one for each template")
    if writer is not None:
        find_language(writer)
    asked = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"metrics": [metric]})})
    sign, tried, written = 1 if METRICS[metric].higher_is_better else -1, dict[str, Evaluation](), list[str]()

    def gain(template: str) -> float:
        return sign * tried[template].scores[metric].value

    with session():
        while ahead:
            before = max(map(gain, tried), default=float("-inf"))
            tried |= zip(ahead, evaluate(asked, [list(adapters)], templates=ahead, progress=progress), strict=True)
            best = max(tried, key=gain)
            if gain(best) <= before or len(tried) == tries:
                break
            ahead = longer([best, beside(best, tried, metric)], given.additions, tried)
            if writer is not None:
                new = write(writer, tried, metric, tries - len(tried), progress)
                written += new
                ahead = in_turn(new, ahead)
            ahead = ahead[: tries - len(tried)]
        order = sorted(tried, key=gain, reverse=True)
        fresh = asked.evaluate.model_copy(update={"seed": asked.evaluate.seed + FRESH})
        again = asked.model_copy(update={"evaluate": fresh})
        plain, chosen = evaluate(again, [list(adapters)], templates=[PLAIN, order[0]], progress=progress)
    difference = compare_by(metric, plain, chosen, besides=("template",))
    drawn = tuple(each for each in dict.fromkeys(written) if each in tried)
    return Found(metric, {each: tried[each] for each in order}, difference, drawn)


def beside(best: str, tried: Mapping[str, Evaluation], metric: str) -> str:
    """Whom to go on from beside the best: of the others the one that draws best what the best fails at.

    Where nothing is known to fail, as of a metric of all pictures together, the next best.
    """
    failing = analyse(tried[best], metric).prompts
    sign = 1 if METRICS[metric].higher_is_better else -1

    def gain(template: str) -> tuple[float, float]:
        found = tried[template]
        overall = found.scores[metric].value
        return sign * (score_on(found, metric, failing) if failing else overall), sign * overall

    return max((template for template in tried if template != best), key=gain, default=best)


def longer(parents: Sequence[str], additions: Sequence[str], known: Collection[str]) -> list[str]:
    """Each of two templates in the other one, then both with an addition more, as far as they do not have that yet.

    In turn, so that none takes all tries.
    """
    first, second = parents
    found = [first.replace(PLAIN, second)] if not has(first, second) and not has(second, first) else []
    found += [second.replace(PLAIN, first)] if found else []
    found += [f"{template}{addition}" for addition in additions for template in parents if addition not in template]
    return [each for each in dict.fromkeys(found) if each not in known]


def has(template: str, other: str) -> bool:
    """Whether all words of another template are in a template."""
    return all(words in template for words in other.split(PLAIN))


def in_turn(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """One of each, as long as there are any; each once."""
    pairs = zip_longest(first, second)
    return list(dict.fromkeys(each for pair in pairs for each in pair if each is not None))


def write(writer: str, tried: Mapping[str, Evaluation], metric: str, number: int, progress: Progress) -> list[str]:
    """What a language model proposes beside what was tried."""
    scores = {template: found.scores[metric].value for template, found in tried.items()}
    sign = 1 if METRICS[metric].higher_is_better else -1
    best = tried[max(scores, key=lambda each: sign * scores[each])]
    # Seeds go on with what was tried, so that a second round hears other words.
    return write_templates(
        writer, metric, scores, analyse(best, metric), best.sampling.prompts, number, len(tried), progress
    )


def table(found: Found) -> str:
    """What was tried, best first, what fails, and how sure the best is."""
    rows = [["template", found.metric, "95 % interval"]]
    for template, evaluation in found.tried.items():
        score = evaluation.scores[found.metric]
        rows.append([template, short(score.value), interval(score.low, score.high)])
    verdict = {None: "cannot be told from them", 0: "better", 1: "worse"}[found.again.better]
    lines = [columns(rows), ""]
    for title, template in {"as they are": PLAIN, "in the best": found.best}.items():
        fails = found.fails(template)
        for kind, values in {"prompts": fails.prompts, "words": fails.words}.items():
            if values:
                worst = "; ".join(f"{name} {short(value)}" for name, value in list(values.items())[:TOLD])
                lines.append(f"{kind} drawn worst {title}: {worst}")
    if found.written:
        lines.append(f"written by the language model: {'; '.join(found.written)}")
    value = f"{found.again.value:+.3g} ({interval(found.again.low, found.again.high)})"
    return "\n".join([*lines, f"{value} against the plain prompts on fresh seeds: {verdict}"])
