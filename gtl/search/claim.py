"""Who runs a study: one process at a time, on a disk and in a bucket alike.

A file says who, and a count in another goes up as long as that process lives. A process that was killed leaves both
behind: on its own machine that is seen at once, from another when the count has stood still for a while. Which of
several that come at the same moment is first, `Store.create` decides; in a bucket where it cannot, who wrote last
stays, and the other is interrupted when it counts next.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from gtl.search.record import now
from gtl.storage import Store
from gtl.types import Progress, UserError

DRIVER = "driver.json"
"""In the folder of a study's versions."""
BEAT_S = 5.0
"""Between two counts."""
STALE_S = 30.0
"""That the count may stand still while its process is taken to live."""
SETTLE_S = 1.0
"""After the file of a dead process is replaced, until that counts: another may have replaced it at the same moment."""


@dataclass(frozen=True)
class Driver:
    """A process that runs a study."""

    token: str
    host: str
    processes: str
    """Within which `pid` is one: a container has its own. Empty where the system has one set for all."""
    pid: int
    since: str

    @property
    def beats(self) -> str:
        """Where it counts: not in the file that says who, in which it might undo that another took its place."""
        return f"driver-{self.token}"

    @property
    def is_gone(self) -> bool:
        """Whether it is known to have ended; not known of other machines and containers."""
        if (self.host, self.processes) != (socket.gethostname(), processes()):
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # it is another user's
            return False
        return False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def processes() -> str:
    """What tells this container's processes from another's with the same numbers."""
    link = Path("/proc/self/ns/pid")
    return os.readlink(link) if link.is_symlink() else ""


def read(studies: Store) -> Driver | None:
    """Who runs a study, or did when it was killed; None: nobody."""
    try:
        return Driver(**json.loads(studies.read(DRIVER)))
    except FileNotFoundError:
        return None


def beat_of(studies: Store, driver: Driver) -> bytes | None:
    """How far a driver has counted; None: not at all."""
    try:
        return studies.read(driver.beats)
    except FileNotFoundError:
        return None


@contextmanager
def claimed(studies: Store, progress: Progress) -> Iterator[None]:
    """Be the only one who runs a study, within it; who finds out that it is not any more is interrupted.

    Args:
        studies: The folder of the study's versions.
        progress: Is called where it has to be seen whether somebody lives.

    Raises:
        UserError: another process runs it.
    """
    mine = Driver(uuid.uuid4().hex, socket.gethostname(), processes(), os.getpid(), now())
    take(studies, mine, progress)
    through = threading.Event()
    thread = threading.Thread(target=count, args=(studies, mine, through), daemon=True)
    thread.start()
    try:
        yield
    finally:
        through.set()
        thread.join()
        if read(studies) == mine:
            studies.delete(DRIVER)
        studies.delete(mine.beats)


def take(studies: Store, mine: Driver, progress: Progress) -> None:
    """Put a driver's name into the file.

    Raises:
        UserError: another one's is there, and it lives.
    """
    while not studies.create(DRIVER, to_json(mine)):
        found = read(studies)
        if found is None:  # it has just ended
            continue
        if not found.is_gone and is_counting(studies, found, progress):
            raise UserError(
                f"study {studies.url()}: {found} runs it since {found.since}; wait until it is through, or stop it and "
                "--resume; another --name is another study"
            )
        if read(studies) != found:
            continue
        studies.write(DRIVER, to_json(mine))
        time.sleep(SETTLE_S)
        if read(studies) == mine:
            studies.delete(found.beats)
            return


def is_counting(studies: Store, driver: Driver, progress: Progress) -> bool:
    """Whether a driver's count goes up, or another has taken its place: wait until that is known."""
    progress("study", 0, 0, f"does {driver} still run it, since {driver.since}?")
    before, end = beat_of(studies, driver), time.monotonic() + STALE_S
    while time.monotonic() < end:
        time.sleep(min(1.0, BEAT_S / 4))
        if (found := read(studies)) != driver:
            return found is not None
        if beat_of(studies, driver) != before:
            return True
    return False


def count(studies: Store, mine: Driver, through: threading.Event) -> None:
    """Count until all is through; interrupt or end the process if another driver has taken the study over."""
    beat = 0
    while not through.wait(BEAT_S):
        try:
            if read(studies) != mine:  # this process slept for long, such as a laptop's does
                # Where a shell began it in the background, an interrupt would go unheard.
                is_deaf = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM if is_deaf else signal.SIGINT)
                return
            beat += 1
            studies.write(mine.beats, f"{beat}\n".encode())
        except UserError:  # a bucket out of reach: it may be there again before anybody asks
            continue


def to_json(driver: Driver) -> bytes:
    """The bytes of the file."""
    return (json.dumps(asdict(driver)) + "\n").encode()
