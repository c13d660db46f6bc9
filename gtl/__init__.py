"""gtl: generative transfer learning on Ray.

    import gtl

    recipe = gtl.load_recipe("recipe.yaml", ["train.steps=200"])
    published = gtl.train(recipe, "dog")
    gtl.generate(adapters=[str(published)], prompt="a photo of sks dog", out="pictures")

Nothing heavy is imported before it is called.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gtl.config import load_recipe, load_study
    from gtl.evaluate.run import evaluate
    from gtl.generate.command import run as generate
    from gtl.generate.edit_command import run as edit
    from gtl.search.study import tune
    from gtl.train.launch import train
    from gtl.types import UserError

__version__ = "0.1.0"
__all__ = ["UserError", "__version__", "edit", "evaluate", "generate", "load_recipe", "load_study", "train", "tune"]


def __getattr__(name: str) -> Any:
    if name in ("train", "generate", "evaluate"):  # packages that can be called, see gtl/verb.py
        return importlib.import_module(f"gtl.{name}")
    if name in ("load_recipe", "load_study"):
        return getattr(importlib.import_module("gtl.config"), name)
    if name == "edit":
        return importlib.import_module("gtl.generate.edit_command").run
    if name == "tune":
        return importlib.import_module("gtl.search.study").tune
    if name == "UserError":
        return importlib.import_module("gtl.types").UserError
    raise AttributeError(f"module 'gtl' has no attribute {name!r}")
