"""Ranks and data shared by the integration tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.ranks import Ranks
from tests.support.texts import prepare_texts, small_job, write_texts
from tests.support.worker_group import Crew


@pytest.fixture(scope="module", autouse=True)
def nothing_left_in_the_environment() -> Iterator[None]:
    """What a test leaves there decides how all Ray of later ones starts."""
    yield
    told = {name: value for name, value in os.environ.items() if name.startswith(("RAY_AUTH", "RAY_ADDRESS", "ORCH"))}
    assert told == {"RAY_AUTH_MODE": "disabled"}


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="session")
def store_dir(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_texts(texts, tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="session")
def undisturbed(texts: Path, store_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Crew:
    """A run in a world of one from beginning to end, to compare others with."""
    with Crew(
        small_job(texts, determinism="exact"), store_dir, tmp_path_factory.mktemp("alone"), size=1
    ) as worker_group:
        worker_group.start(worker_group.plan(worker_group.ids))
        worker_group.await_finished()
    return worker_group
