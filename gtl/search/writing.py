"""Templates that a language model writes, told what was tried and what fails (OPRO, Yang et al. 2023, 2309.03409)."""

from __future__ import annotations

import re
import threading
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from gtl.backbones.language import open_language
from gtl.config.metrics import METRICS
from gtl.config.templates import PLAIN
from gtl.generate.crew import Batch, Crew, check_code, choose_gpus, naming_machine, work_through
from gtl.report.chart import short
from gtl.types import Progress, quiet

if TYPE_CHECKING:
    from gtl.search.analysis import Analysis

SHOWN = 8
"""Prompts, and templates, that a model is told of; small ones read no more than a page."""
BEGUN = 2
"""Of the best templates, that an answer begins with: a small model goes on in the form that it sees."""
ANSWERS = 4
"""To one question; small models give few that are of use."""
LONGEST = 80
"""Characters of a template; text encoders read no more than some dozens of words."""
LABEL = re.compile(r"^\s*(?:[-*•]|\d+[.):])?\s+")
"""In front of a line of a list."""
SCORE = re.compile(r"\s*\((?:score:?\s*)?[-+]?[\d.]+(?:e-?\d+|[kMG%])?\)[.\s]*$")
"""Behind it, as captions have in what is asked."""
MARKS = r"[\"'`*“”‘’]+"


class Question(NamedTuple):
    """Something that is asked, and how its answer begins."""

    forms: Sequence[tuple[str, str]]
    """(request, begun), the fullest first; the first that the model has room for is taken."""
    seed: int


class Writer:
    """Lives as an actor with one language model."""

    def __init__(self, device: str, spec: str) -> None:
        """A mistake of the user's is raised by the first call: here Ray would wrap it."""
        self._device, self._spec = device, spec
        self._lock = threading.Lock()

    @cached_property
    def _language(self) -> Any:
        return open_language(self._spec).to(self._device)

    def begin(self, code: str) -> None:
        """See `Member`."""
        check_code(code)

    def work(self, items: Sequence[Question]) -> list[list[str]]:
        """Answers to each.

        Raises:
            UserError: the model is not what it has to be, or does not read so much.
        """
        with naming_machine(), self._lock:
            found = []
            for forms, seed in items:
                form = next((form for form in forms if self._language.reads(*form)), forms[-1])
                found.append(self._language.answers(*form, ANSWERS, seed))
            return found


def write_templates(
    spec: str, metric: str, scores: Mapping[str, float], analysis: Analysis, prompts: Sequence[str], number: int,
    seed: int = 0, progress: Progress = quiet,
) -> list[str]:  # fmt: skip
    """Up to so many new templates, on the connected cluster; fewer where a model writes something else.

    The model is there for that long only: its GPU is for the drawing then.

    Args:
        spec: Names the model; see `gtl.backbones.language.open_language`.
        metric: That templates are scored by.
        scores: Of the templates that were tried.
        analysis: Of the best of them, whose prompts that fail it is asked about.
        prompts: That are drawn.
        number: Of templates.
        seed: Of the sampled answer.
        progress: Is called as it goes on.

    Raises:
        UserError: the model is not what it has to be, does not read so much, or workers die again and again.
    """
    worst = next(iter([*analysis.prompts, *prompts]))
    forms = [ask(worst, metric, scores, analysis, number, shown) for shown in (SHOWN, SHOWN // 2, 1)]
    question = Question(forms, seed)
    crew = Crew(Writer, (spec,), [Batch([0], [question], f"what {spec} is asked")], 1, choose_gpus())
    ((_, answers),) = work_through(crew, "write", progress)
    found = dict.fromkeys(each for answer in answers for each in templates_in(answer, worst, scores))
    return list(islice(found, number))


def ask(
    prompt: str, metric: str, scores: Mapping[str, float], analysis: Analysis, number: int, shown: int = SHOWN
) -> tuple[str, str]:  # fmt: skip
    """What a language model is asked, and how its answer begins: captions that have the prompt in them.

    A prompt stands where templates have braces, which small models take for code. The best come last, as they are most
    telling.
    """
    is_higher = METRICS[metric].higher_is_better
    rising = sorted(scores, key=lambda each: scores[each], reverse=not is_higher)[-shown:]
    captions = {template.replace(PLAIN, prompt): scores[template] for template in rising}
    lines = ["A model draws pictures of captions."]
    for kind, failing in {"captions": analysis.prompts, "words": analysis.words}.items():
        if failing:
            lines.append(f"Of the {kind} it draws these worst: {'; '.join(islice(failing, shown))}.")
    lines.append(
        f"Captions with {prompt} in them, and the {metric} of all pictures that are drawn in such words, where "
        f"{'more' if is_higher else 'less'} is better, the best last:"
    )
    lines += [f"{caption} ({short(score)})" for caption, score in captions.items()]
    lines.append(
        f"Write {number} other captions that are drawn better. Each has the words {prompt} in it, and says where it "
        "is, how it looks or what is around it. One a line."
    )
    begun = [f"{place}. {caption}\n" for place, caption in enumerate(list(captions)[-BEGUN:], 1)]
    return "\n".join(lines), f"{''.join(begun)}{len(begun) + 1}."


def templates_in(answer: str, prompt: str, known: Collection[str]) -> list[str]:
    """Lines of an answer that have a prompt in them, as templates nobody knows; without a list's numbers and scores."""
    whole = rf"(?<!\w){re.escape(prompt)}(?!\w)"
    marked = re.compile(f"{MARKS}{whole}{MARKS}|{whole}", re.IGNORECASE)
    found = []
    for line in answer.splitlines():
        text = SCORE.sub("", LABEL.sub("", f" {marked.sub(PLAIN, line)}"))
        text = text.strip().strip("\"'`*.").strip()
        is_one = text.count(PLAIN) == 1 and text != PLAIN and not text.endswith(":")
        if is_one and len(text) <= LONGEST and text not in known:
            found.append(text)
    return list(dict.fromkeys(found))
