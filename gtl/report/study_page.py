"""The page of a study: which trials won, and why. One HTML file that needs nothing else."""

from __future__ import annotations

import datetime
from dataclasses import dataclass

from gtl import __version__
from gtl.report.chart import WIDTH
from gtl.report.page import environment
from gtl.report.run import Picture
from gtl.report.scatter import WIDE, Entry
from gtl.report.study import Study, Trial, read_grid
from gtl.report.study_charts import LEVELS, Board, curves, finalists, make_board, parallel, trade_offs
from gtl.report.study_facts import configurations, headline, next_commands, state, summary, table, worst
from gtl.report.study_reasons import reasons, why

SHOWN = 60
"""Rows of the table that are not folded away."""


@dataclass(frozen=True)
class Drawn:
    """What a trial drew."""

    title: str
    trial: Trial
    entry: Entry
    picture: Picture


def render_study(study: Study) -> str:
    """The page about a study, be it finished or not."""
    board = make_board(study)
    found = {metric: reasons(board, metric) for metric in study.directions}
    lines = [parallel(board, width, row) for width, row in ((WIDE, 84), (WIDTH, 64))] if board.order else []
    now = datetime.datetime.now(datetime.timezone.utc)
    return environment().get_template("study.html").render(
        title=study.title, study=study, board=board, state=state(study), counts=study.numbers(),
        headline=headline(board), summary=summary(board), finalists=finalists(board),
        configurations=configurations(board), why=why(board, found[study.metric]), parallel=lines, reasons=found,
        curves=curves(board), trade_offs=trade_offs(board), rows=table(board), shown=SHOWN, drawn=drawn(board),
        commands=next_commands(board), levels=LEVELS, version=__version__, made=now.strftime("%Y-%m-%d %H:%M UTC"),
    )  # fmt: skip


def drawn(board: Board) -> list[Drawn]:
    """What the best trial drew, and the worst of those that ran to their end."""
    title = "The winner" if board.study.winner else "The best so far"
    pairs = [(title, board.lead), ("The worst that ran to its end", worst(board))]
    found = [(name, one, read_grid(one)) for name, one in pairs if one is not None]
    return [Drawn(name, one, board.entry(one), picture) for name, one, picture in found if picture is not None]
