"""Writing in the background: in order, one at a time, and nothing that went wrong is lost."""

import threading
import time

import pytest

from gtl.train.saver import Saver


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
