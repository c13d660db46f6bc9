"""What is wrong with a recipe or a study, in one line: the key, what was found, what would be right."""

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from gtl.types import UserError

Key = tuple[str | int, ...]
Model = TypeVar("Model", bound=BaseModel)

LONGEST = 80
"""Characters of a value that a message shows."""

WORDINGS = {
    "int_parsing": "should be a whole number",
    "int_from_float": "should be a whole number",
    "int_type": "should be a whole number",
    "float_parsing": "should be a number",
    "float_type": "should be a number",
    "bool_parsing": "should be true or false",
    "bool_type": "should be true or false",
    "string_type": "should be text",
    "string_too_short": "should not be empty",
    "list_type": "should be a list",
    "tuple_type": "should be a list",
    "dict_type": "should be a section with keys",
    "too_short": "should have at least {min_length} in its list",
    "too_long": "should have at most {max_length} in its list",
}
"""pydantic's kinds of mistake, where its own words speak of Python."""


def parse(model: type[Model], values: dict[str, Any]) -> Model:
    """Check a file's values, given as nested dicts.

    Raises:
        UserError: a key or value is wrong.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UserError(explain(error, values, model)) from None


def explain(error: ValidationError, values: Any, model: type[BaseModel]) -> str:
    """The first mistake in `values`, which `model` refused. An unknown key comes first: it explains missing ones."""
    mistakes = error.errors(include_url=False)
    first = next((m for m in mistakes if m["type"] == "extra_forbidden"), mistakes[0])
    key = key_of(first, values)
    # A value that fits no member of a union has an error for each; the member that got furthest is what was meant.
    for other in mistakes:
        deeper = key_of(other, values)
        if len(deeper) > len(key) and deeper[: len(key)] == key:
            first, key = other, deeper
    name = ".".join(map(str, key))
    if first["type"] == "union_tag_invalid":
        tags = first["ctx"]["expected_tags"].split(", ")
        return f"{name}.type: {first['ctx']['tag']!r}: should be {', '.join(tags[:-1])} or {tags[-1]}"
    if first["type"] == "extra_forbidden":
        return f"{name}: unknown key; {hint(key, model, values)}"
    if first["type"] == "missing":
        return f"{name}: missing; a {model.__name__.lower()} needs it"
    words = dict.fromkeys(wording(m, key, model, values) for m in alternatives(mistakes, key, values))
    message = " or ".join(words).replace(" or should be ", " or ").replace(" or should ", " or ")
    if not name:
        return message
    if isinstance(first["input"], dict) and first["type"] == "value_error":
        return f"{name}: {message}"
    found = repr(first["input"])
    return f"{name}: {found if len(found) <= LONGEST else found[:LONGEST] + '...'}: {message}"


def key_of(mistake: ErrorDetails, values: Any) -> Key:
    """Where a mistake is in the file. pydantic's location also holds its names for the members of unions."""
    key: list[str | int] = []
    node: Any = values
    for part in mistake["loc"]:
        inside = part in node if isinstance(node, dict) else isinstance(node, list) and part in range(len(node))
        if inside:
            key.append(part)
            node = node[part]
    if mistake["type"] == "missing":
        key.append(mistake["loc"][-1])
    return tuple(key)


def alternatives(mistakes: Sequence[ErrorDetails], key: Key, values: Any) -> list[ErrorDetails]:
    """The mistakes at one key, one for each member of a union; those of a wrong type only beside none but words."""
    here = [m for m in mistakes if key_of(m, values) == key]
    fitting = [m for m in here if not m["type"].endswith("_type")]
    return here if all(m["type"] == "literal_error" for m in fitting) else fitting


def wording(mistake: ErrorDetails, key: Key, model: type[BaseModel], values: Any) -> str:
    """What would be right, in a recipe's terms."""
    if mistake["type"] in ("model_type", "model_attributes_type"):
        return f"should be a section with the keys {', '.join(known_keys(key, model, values))}"
    if mistake["type"] in WORDINGS:
        return WORDINGS[mistake["type"]].format(**mistake.get("ctx", {}))
    message = mistake["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return message[:1].lower() + message[1:]


def hint(key: Key, model: type[BaseModel], values: Any) -> str:
    """The known key that is nearest to an unknown one, else all that its section knows."""
    known = known_keys(key[:-1], model, values)
    close = difflib.get_close_matches(str(key[-1]), known, n=1)
    return f"did you mean {'.'.join(map(str, [*key[:-1], close[0]]))}?" if close else f"known keys: {', '.join(known)}"


def known_keys(key: Key, model: type[BaseModel], values: Any) -> list[str]:
    """Names of the keys in the section at a key, in the order of the section."""
    sections, node = [model], values
    for part in key:
        node = node[part]
        if isinstance(part, str):
            fields = [s.model_fields[part] for s in sections if part in s.model_fields]
            if fields:  # else it is an entry of a mapping, whose sections are all of one kind
                sections = [found for field in fields for found in sections_in(field.annotation)]
            sections = of_type(sections, node)
    return list(dict.fromkeys(name for section in sections for name in section.model_fields))


def of_type(sections: list[type[BaseModel]], node: Any) -> list[type[BaseModel]]:
    """Of sections that their key `type` tells apart, the one that is meant; the first where the key is left out."""
    if len(sections) < 2 or not isinstance(node, dict) or not all("type" in s.model_fields for s in sections):
        return sections
    wanted = node.get("type", sections[0].model_fields["type"].default)
    return [s for s in sections if s.model_fields["type"].default == wanted]


def sections_in(annotation: Any, *, elements: bool = True) -> Iterator[type[BaseModel]]:
    """The sections that a type is made of: itself, the members of a union, the elements of a list if these count."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    if elements or get_origin(annotation) is not list:
        for argument in get_args(annotation):
            yield from sections_in(argument, elements=elements)
