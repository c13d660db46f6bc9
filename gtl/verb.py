"""Rooms whose names are verbs: `gtl.train` is the package, and calling it trains."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


def callable_as(room: str, target: str) -> None:
    """Let a package be called, which calls a function of one of its modules; that is imported only then.

    Args:
        room: The package's `__name__`.
        target: `module:function` inside the package.
    """
    module, _, name = target.partition(":")

    class Room(ModuleType):
        """A package that can be called."""

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return getattr(importlib.import_module(f"{room}.{module}"), name)(*args, **kwargs)

    sys.modules[room].__class__ = Room
