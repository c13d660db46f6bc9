"""Templates of prompts that are searched: what is tried, what is chosen, what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from gtl.config import load_recipe
from gtl.config.templates import Templates, read_templates
from gtl.evaluate.estimate import Estimate
from gtl.evaluate.result import Evaluation, Sampling, make_score
from gtl.search import prompts
from gtl.search.prompts import failing, longer, search_prompts, table
from gtl.types import UserError

FACTS = {"extractor": "reader", "resize": "none", "dtype": "exact"}
SUBJECTS = ["a ring", "a moon"]


def evaluation(template: str, right: list[float], seed: int = 0) -> Evaluation:
    rows = torch.tensor(right, dtype=torch.float64)
    share = float(rows.mean())
    estimate = Estimate("prompt_accuracy", share, share - 0.1, share + 0.1, rows - share)
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
    """`large` helps, and `bright` does beside it; a third addition does not."""
    rounds: list[tuple[int, list[str]]] = []

    def scored(asked: Any, adapters: list[list[str]], *, templates: list[str], progress: Any) -> list[Evaluation]:
        rounds.append((asked.evaluate.seed, templates))
        assert adapters == [["dog"]]
        shares = [0.4 + 0.2 * ("large" in t) + 0.2 * ("bright" in t) - 0.1 * ("dull" in t) for t in templates]
        return [evaluation(t, [1.0] * round(100 * s) + [0.0] * (100 - round(100 * s)), asked.evaluate.seed)
                for t, s in zip(templates, shares, strict=True)]  # fmt: skip

    monkeypatch.setattr(prompts, "evaluate", scored)
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


def test_an_addition_comes_once_and_no_template_takes_all_tries() -> None:
    assert longer(["a {}, x", "b {}"], [", x", ", y"], {"b {}, x": 1}) == ["a {}, x, y", "b {}, y"]


def test_prompts_that_fail_are_named_worst_first() -> None:
    right = [1.0, 0.0] * 10
    assert failing(evaluation("{}", right), "prompt_accuracy") == ("a moon",)


def test_templates_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "templates.yaml"
    file.write_text("templates: ['{} in oil']\nadditions: []\n")
    assert read_templates(str(file)) == Templates(templates=["{} in oil"], additions=[])
    assert read_templates(None).templates[0] == "{}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("templates: [a photo]", r"templates.0: 'a photo': should have \{\}, where the prompt goes"),
        ("templates: []", "templates: .*should have at least 1 in its list"),
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
        ({"metric": "val_loss"}, "--metric: val_loss: is not of pictures; expected one of "),
    ],
)
def test_what_cannot_be_searched_is_named(recipe: Any, options: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        search_prompts(recipe, **options)
