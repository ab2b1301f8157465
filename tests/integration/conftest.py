"""Ranks and data shared by the integration tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.client import OrchestratorClient
from tests.support.ranks import Ranks
from tests.support.texts import prepare_texts, small_job, write_texts
from tests.support.worker_group import LocalWorkerGroup

# What takes longest, journeys first: it begins first, so that all processes of pytest end at about the same time.
LONGEST = (
    "test_storage_faults",
    "test_by_url",
    "test_real_run",
    "test_cli",
    "test_real_run_in_bucket",
    "test_top",
    "test_ray_train",
    "test_chaos",
    "test_moves",
    "test_control",
    "test_tasks",
    "test_coming_from",
    "test_verify",
    "test_priorities",
    "test_tracking_mlflow",
    "test_real_run_tasks",
    "test_exact",
    "test_control_losses",
    "test_local_cluster",
    "test_engine",
    "test_keeper",
    "test_pools",
    "test_autoscaling",
    "test_report",
    "test_control_plane",
    "test_replay",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: number for number, name in enumerate(LONGEST)}
    places = [place for place, item in enumerate(items) if item.path.parent == Path(__file__).parent]
    ours = sorted((items[place] for place in places), key=lambda item: order.get(item.path.stem, len(LONGEST)))
    for place, item in zip(places, ours, strict=True):
        items[place] = item


@pytest.fixture(scope="module", autouse=True)
def nothing_left_in_the_environment() -> Iterator[None]:
    """Variables that tests of a module leave decide how all Ray of later ones starts."""

    def variables() -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if name.startswith(("RAY_", "ORCHESTRATOR_"))}

    before = variables()
    yield
    assert variables() == before


@pytest.fixture(scope="session")
def ray_of_session() -> Iterator[str]:
    """Address of the Ray, with four processors, of the modules of this process that need none of their own."""
    from tests.support.control import ray_head  # loads Ray, which few tests need

    with ray_head(num_cpus=4) as address:
        yield address


@pytest.fixture(scope="module")
def ray_cluster(ray_of_session: str) -> Iterator[None]:
    """That Ray, joined by this process. A module finds nothing there but the scheduler, and leaves nothing else."""
    from tests.support.control import assert_only_the_scheduler_is_left, joined

    with joined(ray_of_session):
        yield
        assert_only_the_scheduler_is_left()


@pytest.fixture(scope="session")
def home_of_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Home with a local cluster, of four processors, of the journeys of this process that need none of their own."""
    from orchestrator.cluster import local
    from tests.support.real_runs import at_home

    home = tmp_path_factory.mktemp("home")
    with at_home(home):
        local.up(4)
    yield home
    with at_home(home):
        local.down()


@pytest.fixture(scope="module")
def client_of_module(home_of_session: Path) -> Iterator[OrchestratorClient]:
    """A client of that cluster, in a process that looks for clusters there."""
    from orchestrator.cluster import local
    from tests.support.real_runs import at_home

    with at_home(home_of_session):
        yield OrchestratorClient(local.up(4).record.address)


@pytest.fixture
def client(client_of_module: OrchestratorClient) -> Iterator[OrchestratorClient]:
    """That client. A test finds nothing in the cluster but the scheduler, and leaves nothing else."""
    from tests.support.control import assert_only_the_scheduler_is_left

    yield client_of_module
    assert_only_the_scheduler_is_left()


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """The device of ranks and workers."""
    return str(request.param)


@pytest.fixture(scope="session")
def ranks(device: str) -> Iterator[Ranks]:
    pool = Ranks(device)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="session")
def store_dir(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_texts(texts, tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="session")
def undisturbed(
    device: str, texts: Path, store_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> LocalWorkerGroup:
    """A run in a world of one from beginning to end, to compare others with."""
    with LocalWorkerGroup(
        small_job(texts, determinism="exact"), store_dir, tmp_path_factory.mktemp("alone"), size=1
    ) as worker_group:
        worker_group.start(worker_group.plan(worker_group.ids))
        worker_group.await_finished()
    return worker_group
