"""Writing in the background: in order, one at a time, and nothing that went wrong is lost."""

import threading
import time
from collections.abc import Callable

import pytest

from gtl.train.saver import Cadence, Saver


def test_the_next_write_waits_for_the_one_before_and_the_caller_for_none() -> None:
    may_end, written = threading.Event(), []

    def slow() -> None:
        assert may_end.wait(10)
        written.append("slow")

    with Saver() as saver:
        saver.submit(slow)
        saver.check()
        assert written == []  # training goes on
        may_end.set()
        saver.submit(lambda: written.append("next"))
        assert written[0] == "slow"
    assert written == ["slow", "next"]


def fail() -> None:
    raise OSError("the disk is full")


def test_what_fails_is_raised_by_the_next_call() -> None:
    written: list[str] = []
    with pytest.raises(OSError, match="the disk is full"), Saver() as saver:
        saver.submit(fail)
        saver.submit(lambda: written.append("never"))
    assert written == []


def test_what_has_failed_is_found_out_without_a_next_write() -> None:
    failed = threading.Event()

    def fail_and_tell() -> None:
        failed.set()
        fail()

    with Saver() as saver:
        saver.submit(fail_and_tell)
        assert failed.wait(10)
        with pytest.raises(OSError, match="the disk is full"):
            while True:
                saver.check()
                time.sleep(0.001)
        saver.check()


def test_what_fails_at_last_is_raised_at_the_end() -> None:
    with pytest.raises(OSError, match="the disk is full"), Saver() as saver:
        saver.submit(fail)


def test_an_error_of_training_is_not_hidden_by_one_of_writing() -> None:
    with pytest.raises(ValueError, match="diverged"), Saver() as saver:
        saver.submit(fail)
        raise ValueError("diverged")


def drive(write_steps: float, every: int, steps: int) -> tuple[list[int], int, int]:
    """Saves, the most steps that a kill would have cost, and the steps after which training waited.

    A write takes so many steps of a second each; there is no real time in it.
    """

    class Timed(Saver):
        seconds = 0.0
        until, waits = 0.0, 0

        def submit(self, write: Callable[[], None]) -> None:
            self.until = now + write_steps

        def wait(self) -> None:
            nonlocal now
            if now < self.until:
                self.waits += 1
                now = self.until
            self.seconds = write_steps

    now, saver = 0.0, Timed()
    cadence, saved, wish, whole, worst = Cadence(every, 0, saver), list[int](), False, 0, 0
    for step in range(1, steps + 1):
        now += 1
        if saved and now >= saver.until:
            whole = saved[-1]
        worst = max(worst, step - whole)
        cadence.hold(step)
        due, wish = wish, cadence.is_early(step, 1.0)
        if due or step - (saved[-1] if saved else 0) >= every:
            saver.wait()
            whole = saved[-1] if saved else 0
            saver.submit(lambda: None)
            saved.append(step)
            cadence.begin(step)
            wish = False
    return saved, worst, saver.waits


@pytest.mark.parametrize(
    ("write_steps", "every", "saved", "waits"),
    [
        (0, 10, [10, 20, 30, 40], 0),
        (0.9, 10, [10, 20, 30, 40], 4),  # so brief a one is waited for
        (1, 10, [10, 19, 28, 37], 1),  # waits for the first, of which nobody knows how long it takes
        (2, 10, [10, 18, 26, 34], 1),
        (6, 10, [10, 18, 26, 34], 4),  # no more than a quarter earlier
        (1, 3, [3, 6, 9, 12], 14),
    ],
)
def test_no_kill_costs_more_than_the_steps_between_two(
    write_steps: float, every: int, saved: list[int], waits: int
) -> None:
    found, worst, waited = drive(write_steps, every, 42)
    assert (found[:4], worst) == (saved, every)
    assert waited == waits
