"""The base of every section of a recipe, and the places a recipe names."""

import os
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator


class Section(BaseModel):
    """A part of a recipe: immutable, and a key that it does not know is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _empty_means_defaults(cls, values: Any) -> Any:
        """YAML reads a section with nothing below it as null."""
        return {} if values is None else values

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Python, and Pydantic with it, takes true for 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("should not be true or false")
        return value


def type_of(default: str) -> Callable[[Any], str]:
    """What tells the members of a union of sections apart: their key `type`, `default` where it is left out."""

    def read(value: Any) -> str:
        if isinstance(value, dict):
            return str(value.get("type", default))
        return str(getattr(value, "type", default))

    return read


def is_url(place: str) -> bool:
    """Whether a place is named by a scheme, such as s3://bucket/x or builtin:tiny, and not a local path."""
    return "://" in place or place.startswith("builtin:")


def absolute(place: str) -> str:
    """A local path as an absolute one, so that workers in another working directory agree; a URL as it is."""
    return place if is_url(place) else os.path.abspath(os.path.expanduser(place))


def absolute_if_local(source: str) -> str:
    """Like `absolute`, for a name that may also be a hub id: `org/name` is a path only where that folder exists."""
    local = source.startswith((".", "/", "~")) or os.path.isdir(source)
    return absolute(source) if local else source


Place = Annotated[str, Field(min_length=1), AfterValidator(absolute)]
"""A local path or a URL."""
ModelSource = Annotated[str, Field(min_length=1), AfterValidator(absolute_if_local)]
"""A hub id, a local path or a URL."""
