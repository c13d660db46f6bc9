"""A small actor between the launcher and work on the cluster: rows one way, the wish to stop the other."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


class Board:
    """Lives as a Ray actor without resources; made by `make_board`."""

    def __init__(self) -> None:
        self._rows: list[Row] = []
        self._stop = False
        self._mistake: str | None = None

    def push(self, row: Row) -> bool:
        """Post a row; whether the work should save and stop."""
        self._rows.append(row)
        return self._stop

    def take(self) -> list[Row]:
        """Rows since the last call."""
        rows, self._rows = self._rows, []
        return rows

    def stop(self) -> None:
        """Ask the work to save and stop."""
        self._stop = True

    def post_mistake(self, message: str) -> None:
        """Post what the user has to mend."""
        self._mistake = message

    def mistake(self) -> str | None:
        """What the user has to mend, if a worker met something."""
        return self._mistake


def make_board() -> Any:
    """A handle of a new board, on this machine: any other may be lost, and the run would be lost with it."""
    import ray

    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    return ray.remote(num_cpus=0, label_selector=here)(Board).remote()
