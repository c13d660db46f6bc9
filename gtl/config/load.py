"""Reading and writing recipes and studies: YAML and `--set a.b=c`."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from gtl.config.base import is_url
from gtl.config.explain import parse
from gtl.config.keys import put
from gtl.config.recipe import Recipe
from gtl.config.study import Study
from gtl.storage import Store
from gtl.types import UserError

SECTIONS = {
    "recipe": "`model:` and `data:`", "study": "`recipe:` and `space:`",
    "serve config": "`http_options:` and `applications:`", "blocks": "`unet.mid_block: 0.5`",
    "templates": "`templates:` and `additions:`",
}  # fmt: skip
"""What a file of each kind has in it."""


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, or a bucket URL of one, apply `key=value` overrides, check it.

    Relative paths inside the file are relative to the working directory, as on any command line.

    Raises:
        UserError: the file or a key is wrong; the message is one line.
    """
    values = read_sections(path, "recipe")
    for override in overrides:
        set_key(values, override)
    return parse_recipe(values)


def read_sections(
    path: str | Path, kind: Literal["recipe", "study", "serve config", "blocks", "templates"]
) -> dict[str, Any]:
    """What is in a YAML file, or a bucket URL of one, whose outermost level is one of keys.

    Raises:
        UserError: there is no such file, or it is something else.
    """
    try:
        values = read_yaml(read_bytes(str(path)).decode())
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error  # that of a bucket is long
        raise UserError(f"{kind} {path}: {reason}; expected a YAML file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{kind} {path}: not text in UTF-8 ({error})") from error
    except yaml.YAMLError as error:
        raise UserError(f"{kind} {path}: not valid YAML: {explain_yaml(error)}") from error
    if not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        raise UserError(f"{kind} {path}: expected sections such as {SECTIONS[kind]}, found {found}")
    return values


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
    return parse(Recipe, values)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `load_recipe` reads back to the same value."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study file, or a bucket URL of one, apply `key=value` overrides, check it.

    A relative path of its recipe is looked for in the study's folder first, then in the working directory; other
    relative paths are relative to the working directory. `--set recipe.train.steps=10` changes the recipe, be it a
    path or inline, `--set set.train.steps=10` what is set over it, and `--set space.tuner.rank.choice=[4, 8]` how a key
    is drawn.

    Raises:
        UserError: the file or a key is wrong; the message is one line.
    """
    values = read_sections(path, "study")
    for override in overrides:
        set_study_key(values, override, str(path))
    return parse_study(with_recipe(values, str(path)))


def parse_study(values: dict[str, Any]) -> Study:
    """Check a study given as nested dicts, its recipe among them, and make paths absolute.

    Raises:
        UserError: a key or value is wrong.
    """
    return parse(Study, values)


def dump_study(study: Study) -> str:
    """The resolved study as YAML that `load_study` reads back to the same value; its recipe is in it."""
    return yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def with_recipe(values: dict[str, Any], path: str) -> dict[str, Any]:
    """A study's values with its recipe read, if they have its path.

    Raises:
        UserError: there is no such file, or it is something else.
    """
    recipe = values.get("recipe")
    if not isinstance(recipe, str):
        return values
    if not is_url(recipe) and not os.path.isabs(recipe):
        beside = f"{path.rpartition('/')[0] or '.'}/{recipe}" if "://" in path else str(Path(path).parent / recipe)
        recipe = beside if "://" in path or Path(beside).exists() else recipe
    return {**values, "recipe": read_sections(recipe, "recipe")}


def set_study_key(values: dict[str, Any], override: str, path: str) -> None:
    """Like `set_key`. What is below `set`, and the first part of what is below `space`, is one dotted key.

    Raises:
        UserError: it has no `=`, a section on the way is none, or the value is not YAML.
    """
    (first, *rest), value = read_override(override)
    if first == "recipe" and rest:
        values.update(with_recipe(values, path))
    if first == "set" and rest:
        rest = [".".join(rest)]
    if first == "space" and rest:
        dotted, known = ".".join(rest), values.get("space") or {}
        inside = [key for key in known if dotted.startswith(f"{key}.")]
        key = max(inside, key=len, default=dotted)
        below = dotted.removeprefix(key).removeprefix(".")
        kind, _, parent = below.partition(".")
        rest = [key, *(part for part in (kind, parent) if part)]
    put(values, [first, *rest], value, f"--set {override}")


def set_key(values: dict[str, Any], override: str) -> None:
    """Apply one `a.b=c` in place; c is read as YAML, so that numbers, lists and null keep their types.

    Raises:
        UserError: it has no `=`, a section on the way is none, or the value is not YAML.
    """
    path, value = read_override(override)
    put(values, path, value, f"--set {override}")


def read_override(override: str) -> tuple[list[str], Any]:
    """The key of `a.b=c`, part by part, and the value.

    Raises:
        UserError: it has no `=`, or the value is not YAML.
    """
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise UserError(f"--set {override}: expected KEY=VALUE, for example train.steps=100")
    try:
        return path, read_yaml(text)
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
