"""One group of one process and one of two for all engine tests."""

from collections.abc import Iterator

import pytest

from tests.engine.group import Group


@pytest.fixture(scope="session")
def solo() -> Iterator[Group]:
    """A group of one process."""
    with Group(1) as group:
        yield group


@pytest.fixture(scope="session")
def duo() -> Iterator[Group]:
    """A group of two processes."""
    with Group(2) as group:
        yield group
