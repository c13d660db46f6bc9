"""Dotted keys of a recipe: which there are, which are near to another, and values with some of them changed."""

import copy
import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from gtl.config.explain import sections_in
from gtl.types import UserError

KINDS = ("tuner.type", "objective.type")
"""Keys whose value says which other keys their section has."""
LENGTHS = {"train.steps": "train.epochs", "train.epochs": "train.steps"}
"""Of two keys of which a recipe has one, each the other."""
NEAR = 3
"""Keys that a message proposes at most."""
ALIKE = 0.75
"""From here on two spellings are alike, in `difflib`'s measure."""


def put(values: dict[str, Any], path: Sequence[str], value: Any, where: str) -> None:
    """Give a key inside nested dicts a value, in place; sections on the way that are missing or null are made.

    Raises:
        UserError: a section on the way is none; the message begins with `where`.
    """
    *parents, last = path
    node: Any = values
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise UserError(f"{where}: {parent} is {node!r}, not a section with keys")
    node[last] = value


def over(values: Mapping[str, Any], changes: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A recipe's values with some of them changed.

    A section of another kind (`tuner.type`, `objective.type`) starts from the defaults of that kind: what the recipe
    says of its own kind does not hold for it. A number of steps takes the place of epochs, and the other way round.

    Args:
        values: Nested dicts; they stay as they are.
        changes: By dotted keys.
        where: What a message begins with.

    Raises:
        UserError: a section on the way to a key is none.
    """
    made = copy.deepcopy(dict(values))
    for key, value in sorted(changes.items(), key=lambda change: change[0] not in KINDS):
        path = key.split(".")
        if key in KINDS and (made.get(path[0]) or {}).get("type") != value:
            made[path[0]] = {}
        if key in LENGTHS and value is not None and LENGTHS[key] not in changes:
            put(made, LENGTHS[key].split("."), None, where)
        put(made, path, copy.deepcopy(value), where)
    return made


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key that a file of this kind may have, sections too, those of every kind of section; none inside lists."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for section in sections_in(field.annotation, elements=False):
            yield from keys_of(section, f"{prefix}{name}.")


def check_key(key: str, model: type[BaseModel], where: str) -> None:
    """Refuse a key that no file of this kind can have.

    Raises:
        UserError: names those that are near; the message begins with `where`.
    """
    known = list(dict.fromkeys(keys_of(model)))
    if key not in known:
        close = near(key, known)
        advice = f"did you mean {' or '.join(close)}?" if close else "it is dotted, such as train.learning_rate"
        raise UserError(f"{where}: no such key of a {model.__name__.lower()}; {advice}")


def near(key: str, known: Sequence[str]) -> list[str]:
    """The keys of the same name in other sections, else the one that is spelled alike, else those of a name like it."""
    last = {other: other.rpartition(".")[2] for other in known}
    name = key.rpartition(".")[2]
    if same := [other for other in known if last[other] == name]:
        return same[:NEAR]
    if alike := difflib.get_close_matches(key, known, 1, ALIKE):
        return alike
    names = difflib.get_close_matches(name, list(last.values()), 1, ALIKE)
    return [other for other in known if last[other] in names][:NEAR]
