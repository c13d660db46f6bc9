"""The table of what each kind of transfer is worth: every row can be made, and says what was measured."""

from pathlib import Path

import pytest
import torch

from gtl.bench.transfer import COMPARISONS, Comparison, make_row, open_recipe, table
from gtl.evaluate.estimate import Estimate
from gtl.evaluate.result import Evaluation, Sampling, make_score
from gtl.families import open_family

FACTS = {"extractor": "reader", "resize": "none", "dtype": "exact"}


@pytest.mark.parametrize("one", COMPARISONS, ids=lambda one: one.name)
def test_both_sides_are_measured_alike(one: Comparison, tmp_path: Path) -> None:
    method, baseline = (
        open_recipe(one, arm, tmp_path / side, tmp_path)
        for side, arm in (("method", one.method), ("baseline", one.baseline))
    )
    assert method.evaluate == baseline.evaluate and method.data == baseline.data
    assert method.evaluate.metrics == [one.metric]
    assert method.storage.registry == str(tmp_path / "registry")
    if one.baseline.is_trained:
        assert method.train == baseline.train, "the same steps, batches and rate"
    for recipe in (method, baseline):
        assert open_family(recipe.model.source).name in ("sd", "gan", "classifier", "diffusion_classifier")
    judged = open_recipe(one, one.method, tmp_path / "method", tmp_path, one.measured)
    assert (judged.data.source != method.data.source) == bool(one.measured)


def evaluation(adapter: str | None, right: list[float]) -> Evaluation:
    rows = torch.tensor(right, dtype=torch.float64)
    share = float(rows.mean())
    estimate = Estimate("prompt_accuracy", share, share - 0.1, share + 0.1, rows - share, None, 0, "")
    how = Sampling(prompts=["a"], negative_prompt="", seed=0, steps=2, guidance=3.0, height=64, width=64, dtype="fp32")
    return Evaluation(
        adapter=adapter, base={}, dataset="d", images=1, held_out=0, sampling=how,
        scores={"prompt_accuracy": make_score(estimate, FACTS)}, nearest=[], samples=None,
    )  # fmt: skip


def test_a_row_is_the_method_less_its_baseline() -> None:
    one = COMPARISONS[1]
    method, baseline = evaluation("fast@v1", [1.0] * 90 + [0.0] * 10), evaluation(None, [1.0] * 50 + [0.0] * 50)
    row = make_row(one, method, baseline, (60.0, 0.0), (2_000_000, 0))
    assert row.values == (0.9, 0.5) and row.better == "the method"
    value, low, high = row.difference
    assert value == pytest.approx(0.4) and low is not None and 0 < low < 0.4 < high
    assert make_row(one, baseline, method, (0.0, 60.0), (0, 1)).better == "the baseline"
    assert make_row(one, method, method, (1.0, 1.0), (1, 1)).better == "cannot be told"
    lines = table([row]).splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["kind", one.name]
    assert "60 s" in lines[1] and "2 MB" in lines[1] and "none" in lines[2] and "nothing" in lines[2]
    assert "better: the method" in lines[3] and "+0.4" in lines[3]
