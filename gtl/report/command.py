"""`gtl report`: where the runs and studies are, and where the page goes."""

from __future__ import annotations

from collections.abc import Sequence

from gtl.report.page import Compare, render
from gtl.report.run import find_run, read_run
from gtl.report.study import is_study, read_study
from gtl.report.study_page import render_study
from gtl.storage import Store
from gtl.types import UserError

PAGE = "report.html"
"""In the folder of a run or study: the page about it."""
COMPARISON = "comparison.html"
"""In the folder of the first of several runs."""


def report(run: str, compare: Sequence[str], out: str | None, runs: str, compare_scores: Compare | None = None) -> str:
    """Write the page about a run or a study and return where it is.

    Args:
        run: NAME, NAME@VERSION, or the folder of a run or study.
        compare: Further runs, to be shown beside it.
        out: File or URL of the page; None for the run's folder.
        runs: Folder or bucket URL of all runs.
        compare_scores: Says how the scores of two evaluations differ.

    Raises:
        UserError: there is no such run, it has no metrics yet, or the page cannot be written.
    """
    folders = [find_run(text, runs) for text in (run, *compare)]
    for text, place in zip((run, *compare), folders, strict=True):
        if compare and is_study(place):
            raise UserError(
                f"--compare: {text} is a study, which has a page of its own; compare runs, such as its trials"
            )
    if out is None:
        return write_page(folders, folders[0], COMPARISON if compare else PAGE, compare_scores)
    folder, slash, key = out.rpartition("/")
    if not key:
        raise UserError(f"--out {out}: names a folder; name the page in it, for example {out}{PAGE}")
    return write_page(folders, Store(folder or slash or "."), key, compare_scores)


def write_page(folders: Sequence[Store], place: Store, key: str = PAGE, compare_scores: Compare | None = None) -> str:
    """Write the page about a study, or about the runs in some folders, and return where it is.

    Raises:
        UserError: a run has no metrics yet, a study no trials, or a store fails.
    """
    first = folders[0]
    page = (
        render_study(read_study(first)) if is_study(first)
        else render([read_run(folder) for folder in folders], compare_scores)
    )  # fmt: skip
    place.write(key, page.encode())
    return place.url(key)
