"""Recipes and studies: typed, frozen, checked before torch or ray is imported."""

from gtl.config.load import load_recipe, load_study, parse_recipe, parse_study
from gtl.config.recipe import Recipe
from gtl.config.study import Study

__all__ = ["Recipe", "Study", "load_recipe", "load_study", "parse_recipe", "parse_study"]
