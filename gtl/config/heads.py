"""What only a recipe for heads may ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gtl.config.metrics import OF_LABELS

if TYPE_CHECKING:
    from gtl.config.recipe import Recipe


def check_heads(recipe: Recipe) -> None:
    """Refuse metrics of labels for what learns none.

    Raises:
        ValueError: names the key.
    """
    if recipe.objective.type == "classify":
        return
    given = {"evaluate.metrics": recipe.evaluate.metrics, "evaluate.beside.metrics": recipe.evaluate.beside.metrics}
    if recipe.judged_by is not None:
        given["train.early_stopping.metric or train.checkpoints.best"] = [recipe.judged_by]
    for key, names in given.items():
        for name in names:
            if name in OF_LABELS:
                raise ValueError(f"{key}: {name}: is of what heads say; take it with objective.type: classify")
