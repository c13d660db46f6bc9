"""Weights of a fusion that are searched: what is tried, what is chosen, what is refused."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from gtl.adapters import Card, Registry
from gtl.adapters.card import Base
from gtl.config import load_recipe
from gtl.evaluate.estimate import Estimate
from gtl.evaluate.result import Evaluation, Sampling, make_score
from gtl.search import fusion
from gtl.search.fusion import at, candidates, search_weights, table
from gtl.types import UserError

FACTS = {"extractor": "reader", "resize": "none", "dtype": "exact"}


def test_first_each_alone_then_all_then_others_and_none_twice() -> None:
    found = list(candidates(3, 12, seed=0))
    assert found[:5] == [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 1.0, 1.0), (0.333, 0.333, 0.333)]
    assert len(set(found)) == 12 and all(0.05 <= weight <= 1.25 for weights in found[5:] for weight in weights)
    assert list(candidates(3, 12, seed=0)) == found != list(candidates(3, 12, seed=1))


def test_what_has_no_weight_takes_no_part() -> None:
    assert at(["dog@v1", "neon"], (1.0, 0.45)) == ["dog@v1", "neon:0.45"]
    assert at(["dog@v1", "neon"], (0.0, 1.0)) == ["neon"]


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    registry = Registry(tmp_path / "registry")
    base = Base(source="builtin:tiny", fingerprint="f" * 64, family="sd")
    for name, kind in (("dog", "lora"), ("neon", "lora"), ("whole", "delta")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "weights").write_text(name)
        registry.publish(name, "v1", folder, Card(name=name, version="v1", kind=kind, base=base, tuner={}))
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "model: {source: builtin:tiny}\ndata: {source: 'builtin:scenes'}\nevaluate: {metrics: [prompt_accuracy]}\n"
        f"storage: {{registry: {tmp_path}/registry}}\n"
    )
    return load_recipe(file)


def test_the_best_is_drawn_again_beside_the_best_alone(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right pictures rise with neon's weight to 0.6, and dog adds to them."""
    calls: list[tuple[int, list[list[str]]]] = []

    def scored(asked: Any, adapters: list[list[str]], progress: Any) -> list[Evaluation]:
        calls.append((asked.evaluate.seed, adapters))
        found = []
        for names in adapters:
            scale = {name.partition(":")[0]: float(name.partition(":")[2] or 1) for name in names}
            right = round(100 * (0.9 - abs(0.6 - scale.get("neon", 0.0)) - 0.1 * ("dog" not in scale)))
            rows = torch.tensor([1.0] * right + [0.0] * (100 - right), dtype=torch.float64)
            share = float(rows.mean())
            estimate = Estimate("prompt_accuracy", share, share - 0.1, share + 0.1, rows - share, None, 0, "")
            how = Sampling(prompts=["a"], negative_prompt="", seed=asked.evaluate.seed, steps=2, guidance=3.0,
                           height=64, width=64, dtype="fp32")  # fmt: skip
            found.append(Evaluation(
                adapter="+".join(names), base={}, dataset="d", images=1, held_out=0, sampling=how, nearest=[],
                scores={"prompt_accuracy": make_score(estimate, FACTS)}, samples=None,
            ))  # fmt: skip
        return found

    monkeypatch.setattr(fusion, "evaluate", scored)
    monkeypatch.setattr(fusion, "session", nullcontext)
    found = search_weights(recipe, ["dog", "neon"], tries=24, seed=3)
    assert len(found.tried) == 24 and len(calls) == 2
    assert abs(found.best[1] - 0.6) <= 0.1 and found.best[0] > 0
    assert found.single == (0.0, 1.0)
    assert calls[1] == (calls[0][0] + fusion.FRESH, [["neon"], at(["dog", "neon"], found.best)])
    assert found.again.better == 0 and found.again.value > 0.2
    lines = table(found).splitlines()
    assert lines[0].split()[:3] == ["dog", "neon", "prompt_accuracy"]
    assert lines[-1].endswith("against neon alone on fresh seeds: better")


@pytest.mark.parametrize(
    ("adapters", "options", "message"),
    [
        (["dog"], {}, "fuse: 1 adapter; expected two or more"),
        (["dog:0.5", "neon"], {}, "adapter dog:0.5: has a weight, and --search finds one; leave it out"),
        (["dog", "neon"], {"tries": 3}, "--tries: 3: expected at least 4"),
        (["dog", "neon"], {"metric": "val_loss"}, "--metric: val_loss: is not of pictures; expected one of "),
        (["dog", "neon"], {"metric": "beauty"}, "--metric: beauty: is not of pictures; expected one of "),
        (["dog", "whole"], {}, "adapter whole: is a delta; --search is for LoRAs, which draw as their sum"),
        (["dog", "cat"], {}, "adapter 'cat': not in the registry"),
    ],
)
def test_what_cannot_be_searched_is_named(recipe: Any, adapters: list[str], options: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        search_weights(recipe, adapters, **options)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
