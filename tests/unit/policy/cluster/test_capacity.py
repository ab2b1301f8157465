"""Room on nodes with GPUs: counted by GPU, since a worker has no parts of two."""

import pytest

from orchestrator.policy.cluster.capacity import DEVICES, places, threads_of


def _places(free: float, gpus: float, devices: int | None) -> int:
    node = {"GPU": free, "CPU": 100.0} | ({} if devices is None else {DEVICES: float(devices)})
    return places([node], {"GPU": gpus, "CPU": 1.0})


@pytest.mark.parametrize("devices", [2, None])
@pytest.mark.parametrize(
    ("free", "gpus", "fit"),
    [
        (2.0, 1.0, 2),
        (1.5, 1.0, 1),
        (2.0, 0.75, 2),
        (1.5, 0.75, 1),  # not two times three quarters of one and a half
        (1.25, 0.75, 1),  # one has taken three quarters of the other GPU
        (0.5, 0.75, 0),
        (1.4, 0.7, 1),
        (2.0, 0.25, 8),
        (1.75, 0.25, 7),
        (0.9, 0.3, 3),
        (0.0, 0.75, 0),
    ],
)
def test_parts_of_two_gpus_make_no_place(free: float, gpus: float, fit: int, devices: int | None) -> None:
    assert _places(free, gpus, devices) == fit


@pytest.mark.parametrize("gpus", [0.6, 0.75, 0.4, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("devices", [1, 2, 5, 8])
def test_on_a_node_of_equal_workers_the_room_is_the_rest(gpus: float, devices: int) -> None:
    room = devices * int(1 / gpus + 1e-9)
    for held in range(room + 1):
        assert _places(devices - held * gpus, gpus, devices) == room - held


def test_others_that_have_whole_gpus_take_no_more_than_these() -> None:
    assert _places(4.0, 0.6, 8) == 4


def test_the_scarcest_resource_decides() -> None:
    assert places([{"GPU": 2.0, "CPU": 1.0, DEVICES: 2.0}, {"CPU": 9.0}], {"GPU": 0.75, "CPU": 1.0}) == 1


@pytest.mark.parametrize(
    ("cores", "workers", "threads"),
    [
        pytest.param([2], 1, 2, id="one has the machine"),
        pytest.param([2], 3, 1, id="more than cores"),
        pytest.param([96, 96], 16, 12, id="eight on each of two nodes"),
        pytest.param([96, 96], 15, 12, id="or seven"),
        pytest.param([96, 64, 0], 4, 32, id="a head without any"),
        pytest.param([], 4, 1, id="no node yet"),
    ],
)
def test_workers_share_the_cores_of_their_node(cores: list[int], workers: int, threads: int) -> None:
    assert threads_of(cores, workers) == threads
