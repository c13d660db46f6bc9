"""Waiting for what comes when it comes."""

import time
from collections.abc import Callable
from typing import Any


def eventually(is_so: Callable[[], Any], seconds: float = 20, pause: float = 0.1) -> bool:
    """Whether something becomes so within a time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if is_so():
            return True
        time.sleep(pause)
    return False
