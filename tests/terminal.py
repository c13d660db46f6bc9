"""Commands in a real pseudo-terminal."""

import os
import pty
import re
from collections.abc import Mapping, Sequence


def in_terminal(command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, str]:
    """Run a command with all its ends at a terminal of 100 x 30: its status, and all that the screen was sent."""
    pid, master = pty.fork()
    if pid == 0:
        size = {"TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
        os.execve(command[0], list(command), {**os.environ, **size, **environment})
    screen = b""
    try:
        while chunk := os.read(master, 4096):
            screen += chunk
    except OSError:  # the other side is gone
        pass
    os.close(master)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), screen.decode(errors="replace")


def plain(screen: str) -> str:
    """Line by line as they came, without the sequences that move the cursor and give colours."""
    return re.sub(r"\r+\n?", "\n", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen))
