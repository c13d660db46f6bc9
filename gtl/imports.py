"""What makes large libraries import sooner, and work without a word."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Within it no garbage is looked for: importing diffusers makes little, and takes a fifth longer for the search."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def absent(name: str) -> Iterator[None]:
    """Within it a library that is not imported yet looks as if it were not installed."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # what import takes for "not there"
    try:
        yield
    finally:
        del sys.modules[name]


@contextmanager
def light() -> Iterator[None]:
    """Within it diffusers, transformers and PEFT are imported in four fifths of the time.

    Wherever it is installed they take bitsandbytes along, whose kernels are called directly here.
    """
    with uncollected(), absent("bitsandbytes"):
        yield


@contextmanager
def quieted() -> Iterator[None]:
    """Within it transformers shows no bars, and no reports of weights that are left out."""
    from transformers.utils import logging

    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()
