"""Data shared by the tests on several hosts."""

from pathlib import Path

import pytest

from tests.support.texts import write_texts


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))
