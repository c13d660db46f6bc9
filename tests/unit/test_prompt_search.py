"""Templates of prompts that are searched: what is tried, what is chosen, what is refused."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gtl.config import load_recipe
from gtl.config.metrics import METRICS
from gtl.config.templates import Templates, read_templates
from gtl.evaluate import scores
from gtl.evaluate.estimate import Estimate, estimate_share
from gtl.evaluate.result import Evaluation, Sampling, make_score
from gtl.search import prompts
from gtl.search.analysis import Analysis, analyse, score_on, scores_of
from gtl.search.prompts import beside, in_turn, longer, search_prompts, table
from gtl.search.writing import BEGUN, ask, templates_in
from gtl.types import UserError

FACTS = {"extractor": "reader", "resize": "none", "dtype": "exact"}
SUBJECTS = ["a ring", "a moon"]


def evaluation(template: str, right: list[float], seed: int = 0) -> Evaluation:
    rows = torch.tensor(right, dtype=torch.float64)
    estimate = estimate_share("prompt_accuracy", float(rows.mean()), rows, len(rows))
    how = Sampling(prompts=SUBJECTS, negative_prompt="", seed=seed, steps=2, guidance=3.0, height=64, width=64,
                   dtype="fp32", template=template)  # fmt: skip
    return Evaluation(
        adapter=None, base={}, dataset="d", images=1, held_out=0, sampling=how, nearest=[], samples=None,
        scores={"prompt_accuracy": make_score(estimate, FACTS)},
    )  # fmt: skip


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    file = tmp_path / "recipe.yaml"
    file.write_text("model: {source: builtin:tiny}\ndata: {source: 'builtin:scenes'}\n"
                    "evaluate: {metrics: [prompt_accuracy], prompts: [a ring, a moon]}\n")  # fmt: skip
    return load_recipe(file)


def test_what_helps_is_added_to_until_nothing_does(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`large` helps, and `bright` does beside it; a third addition does not. A round has four."""
    rounds: list[tuple[int, list[str]]] = []

    def scored(asked: Any, adapters: list[list[str]], *, templates: list[str], progress: Any) -> list[Evaluation]:
        rounds.append((asked.evaluate.seed, templates))
        assert adapters == [["dog"]]
        shares = [0.4 + 0.2 * ("large" in t) + 0.2 * ("bright" in t) - 0.1 * ("dull" in t) for t in templates]
        return [evaluation(t, [1.0] * round(100 * s) + [0.0] * (100 - round(100 * s)), asked.evaluate.seed)
                for t, s in zip(templates, shares, strict=True)]  # fmt: skip

    monkeypatch.setattr(prompts, "evaluate", scored)
    monkeypatch.setattr(prompts, "session", nullcontext)
    given = Templates(templates=["a large {}", "a dull {}"], additions=[", bright", ", dull"])
    found = search_prompts(recipe, ["dog"], given, tries=20)
    assert rounds == [
        (0, ["{}", "a large {}", "a dull {}"]),
        (0, ["a large {}, bright", "{}, bright", "a large {}, dull", "{}, dull"]),
        (0, ["a large {}, bright, dull"]),
        (prompts.FRESH, ["{}", "a large {}, bright"]),
    ]
    assert found.best == "a large {}, bright" and len(found.tried) == 8
    assert found.again.better == 0 and found.again.value == pytest.approx(0.4)
    lines = table(found).splitlines()
    assert lines[1].split("  ")[0] == "a large {}, bright"
    assert lines[-1].endswith("against the plain prompts on fresh seeds: better")
    assert len(search_prompts(recipe, ["dog"], given, tries=4).tried) == 4
    rounds.clear()
    search_prompts(recipe, ["dog"])
    assert [len(drawn) for _, drawn in rounds] == [4, 4, 4, 2], "what is known after four is used for the next four"


def test_an_addition_comes_once_and_no_template_takes_all_tries() -> None:
    assert longer(["a {}, x", "b {}"], [", x", ", y"], {"b {}, x": 1}) == [
        "a b {}, x", "b a {}, x", "a {}, x, y", "b {}, y",
    ]  # fmt: skip


def test_each_of_two_templates_is_put_into_the_other() -> None:
    assert longer(["a large {}", "{} on white"], [", x"], {}) == [
        "a large {} on white", "a large {}, x", "{} on white, x",
    ]  # fmt: skip
    assert longer(["a photo of {}", "a large {}"], [], {}) == ["a photo of a large {}", "a large a photo of {}"]
    assert longer(["a large {} on white", "{} on white"], [], {}) == [], "it has those words already"
    assert longer(["{}", "{}"], [", x"], {}) == ["{}, x"]
    assert longer(["{} in red", "a bored {}"], [", red", "!"], {"{} in red!": 1}) == [
        "a bored {} in red", "a bored {}, red", "a bored {}!",
    ], "words count, not letters"  # fmt: skip
    assert in_turn(["a", "b", "c"], ["d", "a"]) == ["a", "d", "b", "c"]


def test_prompts_that_fail_are_known_by_their_pictures() -> None:
    """Half of the pictures are right: of rings all, of moons none."""
    found = evaluation("{}", [1.0, 0.0] * 10)
    assert analyse(found, "prompt_accuracy") == Analysis({"a moon": 0.0}, {})
    assert score_on(found, "prompt_accuracy", ["a ring"]) == 1.0
    assert analyse(evaluation("{}", [1.0] * 10), "prompt_accuracy") == Analysis({}, {})


def test_words_that_fail_are_known_by_what_several_prompts_have_in_common() -> None:
    found = evaluation("{}", [1.0, 1.0, 0.0, 0.0, 1.0, 0.0] * 3)
    subjects = ["a red ring", "a red moon", "a blue ring", "a Blue moon", "a red star", "a blue arrow"]
    sampling = found.sampling.model_copy(update={"prompts": subjects})
    told = analyse(found.model_copy(update={"sampling": sampling}), "prompt_accuracy")
    assert told.words == {"blue": 0.0}, "`ring` and `moon` are as good as all, and `a` says nothing"
    assert list(told.prompts) == ["a blue ring", "a Blue moon", "a blue arrow"]


def test_where_less_is_better_the_worst_have_most(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.tensor([0.2, 0.8] * 10, dtype=torch.float64)
    score = make_score(Estimate("kid", 0.5, 0.4, 0.6, rows - 0.5), FACTS)
    found = evaluation("{}", [1.0] * 20).model_copy(update={"scores": {"kid": score}})
    assert analyse(found, "kid") == Analysis({}, {}), "of all pictures together"
    monkeypatch.setitem(METRICS, "kid", replace(METRICS["kid"], of_each=True))
    told = analyse(found, "kid")
    assert list(told.prompts) == ["a moon"] and told.prompts["a moon"] == pytest.approx(0.8)


def test_scores_of_each_picture_are_what_their_metrics_are_the_means_of() -> None:
    right, images, texts = (torch.rand(12, width, dtype=torch.float64) for width in (1, 4, 4))
    known = {
        "prompt_accuracy": scores.prompt_accuracy((right > 0.5).double()),
        "clip_score": scores.clip_score(images, texts),
    }
    assert known.keys() == {name for name, one in METRICS.items() if one.of_each}
    for name, estimate in known.items():
        found = evaluation("{}", [1.0]).model_copy(update={"scores": {name: make_score(estimate, FACTS)}})
        values = [value for _, value in scores_of(found, name)]
        assert len(values) == 12 and sum(values) / 12 == pytest.approx(estimate.value)


def test_a_search_goes_on_from_what_mends_failures_of_the_best(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """White draws moons and large rings; red is the second best of all, but no better at rings than many."""
    first = {"{}": (0.2, 0.1), "a large {}": (1.0, 0.1), "a red {}": (0.4, 0.8), "{} in white": (0.3, 1.0)}
    shares = {**first, "a large {} in white": (0.9, 0.9)}
    rounds: list[list[str]] = []

    def scored(asked: Any, adapters: Any, *, templates: list[str], progress: Any) -> list[Evaluation]:
        rounds.append(templates)
        found = []
        for template in templates:
            ring, moon = shares.get(template, (0.0, 0.0))
            right = [float(i // 2 < 10 * (moon if i % 2 else ring)) for i in range(20)]
            one = evaluation(template, right, asked.evaluate.seed)  # with what few pictures have beside the metric
            beside = {"kid": make_score(Estimate("kid", 1.0, 0.9, 1.1, torch.zeros(20)), FACTS)}
            found.append(one.model_copy(update={"scores": {**beside, **one.scores}}))
        return found

    monkeypatch.setattr(prompts, "evaluate", scored)
    monkeypatch.setattr(prompts, "session", nullcontext)
    given = Templates(templates=["a large {}", "a red {}", "{} in white"], additions=[", bright"])
    found = search_prompts(recipe, [], given, tries=20)
    assert list(found.tried)[1:4] == ["{} in white", "a red {}", "a large {}"]
    assert found.fails("{} in white").prompts == {"a ring": pytest.approx(0.3)}
    assert beside("{} in white", {each: found.tried[each] for each in first}, "prompt_accuracy") == "a large {}"
    assert rounds[1] == ["a large {} in white", "{} in white, bright", "a large {}, bright"]
    assert found.best == "a large {} in white" and found.fails(found.best) == Analysis({}, {})
    assert "prompts drawn worst as {}: a moon 0.1" in table(found).splitlines()
    assert [line for line in table(found).splitlines() if line.startswith("prompts drawn worst as a large")] == []


def test_where_plain_prompts_are_the_best_that_is_said_and_nothing_drawn_again(
    recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds: list[list[str]] = []

    def scored(asked: Any, adapters: Any, *, templates: list[str], progress: Any) -> list[Evaluation]:
        rounds.append(templates)
        return [evaluation(template, [1.0, float(template == "{}")] * 10) for template in templates]

    monkeypatch.setattr(prompts, "evaluate", scored)
    monkeypatch.setattr(prompts, "session", nullcontext)
    found = search_prompts(recipe, [], Templates(templates=["a dull {}"], additions=[", dull"]), tries=9)
    assert rounds == [["{}", "a dull {}"], ["{}, dull"]] and found.best == "{}" and found.again is None
    assert table(found).splitlines()[-2:] == ["", "none is better than the plain prompts"]


def test_each_round_hears_a_writer_who_may_say_nothing_of_use(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said = iter([["{} at sea", "{} at night"], []])
    asked: list[tuple[str, int, int]] = []

    def wrote(
        spec: str, metric: str, scores: Any, fails: Any, subjects: list[str], number: int, seed: int, progress: Any
    ) -> list[str]:
        asked.append((spec, number, seed))
        return next(said)

    monkeypatch.setattr(prompts, "evaluate", lambda *_, templates, **__: [evaluation(t, [1.0, 0.0]) for t in templates])
    monkeypatch.setattr(prompts, "session", nullcontext)
    monkeypatch.setattr(prompts, "check_language", lambda spec: None)
    monkeypatch.setattr(prompts, "write_templates", wrote)
    given = Templates(templates=["a {}"], additions=[", in oil", ", in ink", ", in red"])
    found = search_prompts(recipe, [], given, tries=8, writer="some/model")
    assert asked == [("some/model", 4, 2), ("some/model", 2, 6)]
    assert list(found.tried)[2:] == [
        "{} at sea", "{}, in oil", "{} at night", "a {}, in oil", "{}, in ink", "a {}, in ink",
    ]  # fmt: skip
    assert found.written == ("{} at sea", "{} at night")
    assert "written by the language model: {} at sea; {} at night" in table(found)
    assert "written by the language model: nothing of use" in table(replace(found, written=()))


def test_a_language_model_is_told_what_fails_and_the_best_last() -> None:
    scores = {"a large {}": 0.6, "{}": 0.25, "{} in white": 0.7}
    told = Analysis({"a moon": 0.1, "a ring": 0.5}, {"moon": 0.1})
    request, begun = ask("a moon", "prompt_accuracy", scores, told, 5)
    lines = request.splitlines()
    assert lines[1:3] == [
        "Of the captions it draws these worst: a moon; a ring.", "Of the words it draws these worst: moon.",
    ]  # fmt: skip
    assert "with a moon in them, and the prompt_accuracy" in lines[3] and "where more is better" in lines[3]
    assert lines[4:7] == ["a moon (0.25)", "a large a moon (0.6)", "a moon in white (0.7)"]
    assert lines[7].startswith("Write 5 other captions") and len(lines) == 8
    assert begun == "1. a large a moon\n2. a moon in white\n3." and BEGUN == 2
    short, begun = ask("a moon", "prompt_accuracy", scores, told, 5, shown=1)
    assert short.splitlines()[1] == "Of the captions it draws these worst: a moon."
    assert "a moon in white (0.7)" in short and "a large a moon" not in short + begun
    falling, _ = ask("a moon", "kid", scores, Analysis({}, {}), 5)
    assert falling.splitlines()[2:5] == ["a moon in white (0.7)", "a large a moon (0.6)", "a moon (0.25)"]


@pytest.mark.parametrize(("line", "template"), [
    (" a moon at night", "{} at night"), ("4. A moon at night.", "{} at night"), ('- "a moon, in oil" ', "{}, in oil"),
    ("12) a large a moon (0.7)", "a large {}"), ("* the sky has a moon (white) in it", "the sky has {} (white) in it"),
    ("a moon", None), ("a sun at night", None), ("a moon and a moon", None), ("a moon " + 80 * "x", None),
    ("a moon at dusk", None), ("", None), ("llama moon at night", None), ("a moonlit night", None),
    ("'a moon' at night", "{} at night"), ("**a moon** at night", "{} at night"), ("a moon's night", "{}'s night"),
    ("a moon, old (-0.7) ", "{}, old"), ("a moon, old (score: 12.5k).", "{}, old"), ("a moon, old (1e-5)", "{}, old"),
    ("Here are captions of a moon:", None),
])  # fmt: skip
def test_only_lines_with_the_prompt_are_templates(line: str, template: str | None) -> None:
    assert templates_in(f"{line}\n{line}", "a moon", {"{} at dusk": 1}) == ([template] if template else [])


def test_templates_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "templates.yaml"
    file.write_text("templates: ['{} in oil']\nadditions: []\n")
    assert read_templates(str(file)) == Templates(templates=["{} in oil"], additions=[])
    assert read_templates(None).templates[0] == "{}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("templates: [a photo]", r"templates.0: 'a photo': should have \{\} once, where the prompt goes"),
        ("templates: ['{} {}']", r"templates.0: '\{\} \{\}': should have \{\} once, where the prompt goes"),
        ("additions: ['{} x']", r"additions.0: '\{\} x': should have no \{\}: it goes behind a template"),
        ("templates: []", "templates: .*should have at least 1 in its list"),
        ('templates: ["{} \\ud800"]', "templates.0: .*should be a valid string, unable to parse"),
        (f"templates: ['{{}}{1000 * 'x'}']", "templates.0: .*string should have at most 1000 characters"),
        ("words: [a]", "words: unknown key; known keys: templates, additions"),
        ("- a", "templates .*: expected"),
    ],
)
def test_a_file_of_something_else_is_named(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "templates.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        read_templates(str(file))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tries": 3}, "--tries: 3: expected at least 4, one for each template"),
        ({"tries": 4, "writer": "some/model"}, "--tries: 4: the templates take them all; expected more, for --writer"),
        ({"writer": "./nowhere"}, ".*/nowhere: no such folder; expected a folder or hub id of a language model"),
        ({"metric": "clip_score"}, "evaluate.clip: "),
        ({"metric": "val_loss"}, "--metric: val_loss: is not of pictures; expected one of "),
    ],
)
def test_what_cannot_be_searched_is_named(recipe: Any, options: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        search_prompts(recipe, **options)
