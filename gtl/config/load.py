"""Reading and writing a recipe: YAML and `--set a.b=c`."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from gtl.config.explain import explain
from gtl.config.recipe import Recipe
from gtl.storage import Store
from gtl.types import UserError


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, or a bucket URL of one, apply `key=value` overrides, check it.

    Relative paths inside the file are relative to the working directory, as on any command line.

    Raises:
        UserError: the file or a key is wrong; the message is one line.
    """
    try:
        values = read_yaml(read_bytes(str(path)).decode())
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error  # that of a bucket is long
        raise UserError(f"recipe {path}: {reason}; expected a YAML file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"recipe {path}: not text in UTF-8 ({error})") from error
    except yaml.YAMLError as error:
        raise UserError(f"recipe {path}: not valid YAML: {explain_yaml(error)}") from error
    if not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        raise UserError(f"recipe {path}: expected sections such as `model:` and `data:`, found {found}")
    for override in overrides:
        set_key(values, override)
    return parse_recipe(values)


def read_bytes(place: str) -> bytes:
    """What is in a local file or in an object of a bucket.

    Raises:
        OSError: there is none, or it cannot be read.
        UserError: the store cannot be reached.
    """
    if "://" not in place:
        return Path(place).read_bytes()
    folder, _, key = place.rpartition("/")
    return Store(folder).read(key)


def parse_recipe(values: dict[str, Any]) -> Recipe:
    """Check a recipe given as nested dicts and make its paths absolute.

    Raises:
        UserError: a key or value is wrong.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(explain(error, values, Recipe)) from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `load_recipe` reads back to the same value."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def set_key(values: dict[str, Any], override: str) -> None:
    """Apply one `a.b=c` in place; c is read as YAML, so that numbers, lists and null keep their types.

    Raises:
        UserError: it has no `=`, a section on the way is none, or the value is not YAML.
    """
    key, equals, text = override.partition("=")
    *parents, last = key.strip().split(".")
    if not equals or not all([*parents, last]):
        raise UserError(f"--set {override}: expected KEY=VALUE, for example train.steps=100")
    node: Any = values
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise UserError(f"--set {override}: {parent} is {node!r}, not a section with keys")
    try:
        node[last] = read_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: the value is not valid YAML: {explain_yaml(error)}") from error


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice, of which the safe loader silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping.

        Raises:
            yaml.constructor.ConstructorError: a key is given twice.
        """
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} is given twice; keep one", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:
    """The value of a YAML document.

    Raises:
        yaml.YAMLError: it is none, gives a key twice, or holds what is only written like a number or a date.
    """
    try:
        return yaml.load(text, Loader=UniqueKeyLoader)  # noqa: S506 - a safe loader
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    except ValueError as error:  # of the constructors: 2024-13-01, !!int x
        raise yaml.YAMLError(str(error)) from error


def explain_yaml(error: yaml.YAMLError) -> str:
    """What is wrong and where, in one line."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    return f"line {mark.line + 1}: {problem}" if mark and problem else " ".join(str(error).split())
