"""Published adapters: their card, the registry that holds them, and `apply`, which puts one onto a model."""

from gtl.adapters.apply import apply
from gtl.adapters.card import Card
from gtl.adapters.registry import Registry

__all__ = ["Card", "Registry", "apply"]
