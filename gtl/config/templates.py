"""Wordings of prompts: what a search of them begins with, and what it changes."""

from typing import Annotated

from pydantic import AfterValidator, Field

from gtl.config.base import Section
from gtl.config.explain import parse
from gtl.config.load import read_sections

PLAIN = "{}"
"""The template of a prompt that is drawn as it is."""


def check_template(text: str) -> str:
    """Refuse a template that leaves the prompt out, or has it twice."""
    if text.count(PLAIN) != 1:
        raise ValueError(f"should have {PLAIN} once, where the prompt goes, such as a photo of {PLAIN}")
    return text


def check_addition(text: str) -> str:
    """Refuse an addition with another prompt in it."""
    if PLAIN in text:
        raise ValueError(f"should have no {PLAIN}: it goes behind a template, which has the prompt")
    return text


Words = Annotated[str, Field(max_length=1000)]
Template = Annotated[Words, AfterValidator(check_template)]
Addition = Annotated[Words, AfterValidator(check_addition)]


class Templates(Section):
    """What a search begins with, and what it changes."""

    templates: Annotated[list[Template], Field(min_length=1)] = [
        PLAIN, f"a photo of {PLAIN}", f"a high quality picture of {PLAIN}", f"{PLAIN}, plain background",
    ]  # fmt: skip
    """What a prompt is drawn as, in place of the braces."""
    additions: list[Addition] = [", in detail", ", sharp focus", ", centred", ", bright colours"]
    """Put behind the best of them, one at a time."""


def read_templates(path: str | None) -> Templates:
    """A YAML file of `templates` and `additions`; None: some for photographs.

    Raises:
        UserError: it is none.
    """
    return Templates() if path is None else parse(Templates, read_sections(path, "templates"))
