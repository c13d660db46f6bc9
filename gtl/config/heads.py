"""What a recipe for heads may ask for, and what only such a recipe may."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gtl.config.metrics import OF_LABELS, of_pictures

if TYPE_CHECKING:
    from gtl.config.recipe import Recipe


def check_heads(recipe: Recipe) -> None:
    """Refuse metrics of labels for what learns none, and metrics of pictures for what draws none.

    Raises:
        ValueError: names the key.
    """
    classifies = recipe.objective.type == "classify"
    given = {"evaluate.metrics": recipe.evaluate.metrics} if not classifies else {}
    given |= {"evaluate.beside.metrics": recipe.evaluate.beside.metrics}
    if recipe.judged_by is not None:
        given["train.early_stopping.metric or train.checkpoints.best"] = [recipe.judged_by]
    for key, names in given.items():
        for name in names:
            if name in OF_LABELS and not classifies:
                raise ValueError(f"{key}: {name}: is of what heads say; take it with objective.type: classify")
            if classifies and of_pictures([name]):
                raise ValueError(f"{key}: {name}: is of pictures that are drawn, and classify draws none")
