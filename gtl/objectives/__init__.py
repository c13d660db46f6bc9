"""Objectives: what the moving weights learn."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from gtl.types import UserError

if TYPE_CHECKING:
    from gtl.config.objectives import Objective as ObjectiveConfig
    from gtl.config.pairs import Needs
    from gtl.families.base import Family
    from gtl.objectives.base import Objective

OBJECTIVES = {
    "align": "gtl.objectives.align:Align",
    "adversarial": "gtl.objectives.adversarial:Adversarial",
    "autoencode": "gtl.objectives.autoencode:Autoencode",
    "classify": "gtl.objectives.classify:Classify",
    "consistency": "gtl.objectives.consistency:Consistency",
    "denoise": "gtl.objectives.denoise:Denoise",
    "distill": "gtl.objectives.distill:Distill",
    "instruct": "gtl.objectives.instruct:Instruct",
}
"""`objective.type` -> module:class."""


def make_objective(config: ObjectiveConfig, family: Family) -> Objective:
    """The objective that a recipe asks for.

    Raises:
        UserError: the model can't learn it.
    """
    if config.type not in family.learns:
        known = " or ".join(family.learns)
        raise UserError(f"objective.type: {config.type}: a model of family {family.name} learns {known}")
    module, _, name = OBJECTIVES[config.type].partition(":")
    objective: Objective = getattr(import_module(module), name)(config, family)
    return objective


def live_parts(objective: Objective, family: Family, needs: Needs) -> list[str]:
    """The parts of the model that its players are made of; the one that it is about comes first."""
    encoders = family.encoders if needs.text == "tokens" else ()
    return list(dict.fromkeys([objective.parts[0], *needs.live, *encoders]))
