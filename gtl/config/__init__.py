"""The recipe: typed, frozen, checked before torch or ray is imported."""

from gtl.config.load import load_recipe, parse_recipe
from gtl.config.recipe import Recipe

__all__ = ["Recipe", "load_recipe", "parse_recipe"]
