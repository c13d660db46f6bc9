"""A search of words around prompts on a real Ray cluster, with a language model that writes some of them."""

from pathlib import Path

from gtl.config import Recipe, parse_recipe
from gtl.config.templates import Templates
from gtl.search.prompts import search_prompts
from tests.language import make_language

STORES = ("runs", "cache", "registry")


def make_recipe(folder: Path) -> Recipe:
    return parse_recipe({
        "model": {"source": "builtin:tiny"}, "data": {"source": "builtin:scenes?count=8", "resolution": 64},
        "evaluate": {"metrics": ["prompt_accuracy"], "samples": 16, "steps": 4, "guidance": 3.0,
                     "prompts": ["a blue moon"]},
        "storage": {name: str(folder / name) for name in STORES},
    })  # fmt: skip


def test_a_search_with_a_writer(ray_cluster: None, tmp_path: Path) -> None:
    """The writer knows words that no list has, and is heard."""
    writer = make_language(tmp_path / "writer", "\n3.", " a blue moon on a black background\n")
    recipe, given = make_recipe(tmp_path), Templates(templates=["{} in the centre"], additions=[])
    phases: dict[str, tuple[int, int]] = {}

    def told(phase: str, done: int, total: int, detail: str = "") -> None:
        phases[phase] = done, total

    found = search_prompts(recipe, [], given, tries=5, writer=str(writer), progress=told)
    assert found.written == ("{} on a black background",)
    assert {"{}", "{} in the centre", "{} on a black background"} <= set(found.tried)
    assert phases["write"] == (1, 1) and phases["draw"][0] == phases["draw"][1]
    best = found.tried[found.best].scores["prompt_accuracy"]
    plain = found.tried["{}"].scores["prompt_accuracy"]
    assert best.value > plain.value and found.again.better == 0
    alone = search_prompts(recipe, [], given, tries=5)
    assert alone.written is None and alone.tried["{}"].scores == found.tried["{}"].scores
