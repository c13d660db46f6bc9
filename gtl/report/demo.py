"""The page of `gtl demo`."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gtl import __version__
from gtl.images import preview
from gtl.report.page import environment

SIDE = 256
"""Of a picture on the page, in pixels at most."""


@dataclass(frozen=True)
class Panel:
    """What several models drew for the same prompts."""

    title: str
    prompts: Sequence[str]
    pictures: Mapping[str, Sequence[Path]]
    """Model -> its pictures, in the order of the prompts."""


def render_demo(
    scores: Sequence[Mapping[str, str]],
    panels: Sequence[Panel],
    steps: Mapping[str, int],
    seconds: Mapping[str, float],
    commands: Sequence[str],
) -> str:
    """The page, one HTML file that needs nothing else.

    Args:
        scores: Rows of the table, all with the same columns.
        panels: The pictures.
        steps: Model -> optimizer steps it was trained for.
        seconds: Model -> how long that took here.
        commands: What the reader can type next.
    """
    shown = [
        {
            "title": panel.title, "prompts": panel.prompts,
            "rows": {model: [preview(f.read_bytes(), SIDE)[0] for f in files]
                     for model, files in panel.pictures.items()},
        }
        for panel in panels
    ]  # fmt: skip
    now = datetime.datetime.now(datetime.timezone.utc)
    return environment().get_template("demo.html").render(
        title="Transfer learning, shown here", scores=scores, panels=shown, steps=steps,
        minutes=sum(seconds.values()) / 60, commands=commands, version=__version__,
        made=now.strftime("%Y-%m-%d %H:%M UTC"),
    )  # fmt: skip
