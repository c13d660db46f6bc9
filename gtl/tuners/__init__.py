"""Tuners: which weights move."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gtl.config.tuners import Tuner as TunerConfig
    from gtl.families.base import Family
    from gtl.tuners.base import Tuner

TUNERS = {
    "lora": "gtl.tuners.lora:Lora",
    "full": "gtl.tuners.full:Full",
    "freeze": "gtl.tuners.freeze:Freeze",
    "prompt": "gtl.tuners.prompt:Prompt",
    "head": "gtl.tuners.head:Head",
}
"""`tuner.type` -> module:class."""


def make_tuner(config: TunerConfig, family: Family) -> Tuner:
    """The tuner that a recipe asks for."""
    module, _, name = TUNERS[config.type].partition(":")
    tuner: Tuner = getattr(import_module(module), name)(config, family)
    return tuner
