"""What becomes of pictures that a safety checker flags: they are refused or blurred, before anything leaves."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

from gtl.images import blur
from gtl.types import UserError
from serve.errors import moderation_blocked
from serve.settings import Safety

if TYPE_CHECKING:
    from PIL.Image import Image

    from gtl.backbones.checker import Checker

log = logging.getLogger(__name__)


class Passed(NamedTuple):
    """A picture that may leave."""

    image: Image
    """Blurred if it is flagged."""
    is_flagged: bool


class Guard:
    """Looks at pictures, one at a time."""

    def __init__(self, safety: Safety, device: str = "cpu") -> None:
        """Load the checker.

        Raises:
            UserError: it is none, or its files are damaged.
        """
        self._checker, self._blurs = load_checker(safety).to(device), safety.action == "blur"

    def look(self, image: Image) -> Passed:
        """What may leave of a picture.

        Raises:
            ApiError: nothing may.
            RuntimeError: the checker failed, and so nothing may either.
        """
        try:
            is_flagged = self._checker.is_flagged(image)
        except Exception as error:  # torch's errors cannot be read where there is no torch
            log.exception("the safety checker failed")
            raise RuntimeError(f"the safety checker failed: {type(error).__name__}") from None
        if is_flagged and not self._blurs:
            raise moderation_blocked()
        return Passed(blur(image) if is_flagged else image, is_flagged)


def load_checker(safety: Safety) -> Checker:
    """The checker that the settings name, on the CPU.

    Raises:
        UserError: it is none, or its files are damaged.
    """
    from gtl.backbones.checker import open_checker

    try:
        return open_checker(safety.checker, safety.threshold)
    except UserError as error:
        raise UserError(f"safety.checker: {error}") from None
