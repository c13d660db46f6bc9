"""A small actor between the launcher and work on the cluster: rows one way, the wish to stop the other."""

from __future__ import annotations

from typing import Any, Literal

Row = dict[str, Any]
Wish = Literal["stop", "enough"]
"""To save and stop, to be gone on with; or as if the last step was made."""


class Board:
    """Lives as a Ray actor without resources; made by `make_board`."""

    def __init__(self) -> None:
        self._rows: list[Row] = []
        self._wish: Wish | None = None
        self._mistake: str | None = None
        self._leave = 0.0

    def push(self, row: Row) -> Wish | None:
        """Post a row; what the launcher asks of the work."""
        self._rows.append(row)
        return self._wish

    def wish(self) -> Wish | None:
        """What is asked of the work."""
        return self._wish

    def take(self) -> list[Row]:
        """Rows since the last call."""
        rows, self._rows = self._rows, []
        return rows

    def ask(self, wish: Wish) -> None:
        """Ask the work to save and stop; to stop stands above having enough."""
        self._wish = "stop" if "stop" in (self._wish, wish) else wish

    def let(self, step: float) -> None:
        """Let the work go on from its look at a step."""
        self._leave = max(self._leave, step)

    def may_go_on(self, step: float) -> bool:
        """Whether work that waits at its looks may go on from one: it was let, or is asked to end."""
        return self._leave >= step or self._wish is not None or self._mistake is not None

    def post_mistake(self, message: str) -> None:
        """Post what the user has to mend."""
        self._mistake = message

    def mistake(self) -> str | None:
        """What the user has to mend, if a worker met something."""
        return self._mistake


def make_board(kind: type[Board] = Board) -> Any:
    """A handle of a new board, on this machine: any other may be lost, and the run would be lost with it."""
    import ray

    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    # Named, or a board that a search's trial makes would have to fit into the trial's own sliver of the cluster.
    return ray.remote(num_cpus=0, label_selector=here, scheduling_strategy="DEFAULT")(kind).remote()


class Post:
    """Through which a worker posts its rows, without waiting."""

    def __init__(self, board: Any) -> None:
        """To a board's handle."""
        self._board, self._pending = board, list[Any]()

    def __call__(self, row: Row) -> Wish | None:
        """What the launcher asks; the answer to an earlier row is soon enough."""
        import ray

        self._pending.append(self._board.push.remote(row))
        answered, self._pending = ray.wait(self._pending, num_returns=len(self._pending), timeout=0)
        return next((wish for wish in reversed(ray.get(answered)) if wish), None)

    def finish(self) -> None:
        """Until the launcher can have all rows."""
        import ray

        ray.get(self._pending)
