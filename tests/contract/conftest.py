"""Models that tests only read, each written once."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest

from tests.contract.test_families import MODELS


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a model under test, by its name."""

    @lru_cache
    def write(model: str) -> Path:
        return MODELS[model][1](tmp_path_factory.mktemp(model))

    return write
