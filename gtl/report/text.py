"""Tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def columns(rows: Sequence[Sequence[str]], numbers: bool = False) -> str:
    """Rows of cells below each other, two spaces apart; with `numbers` all but the first column end alike."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        first, *rest = zip(row, widths, strict=True)
        padded = [cell.rjust(width) if numbers else cell.ljust(width) for cell, width in rest]
        lines.append("  ".join([first[0].ljust(first[1]), *padded]).rstrip())
    return "\n".join(lines)
