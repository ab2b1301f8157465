"""Schedules of chaos runs: a pure function of the seed, with faults that can be made."""

from itertools import pairwise

import pytest

from tests.chaos.schedule import LEAST_WORKERS, MOST_WORKERS, PACES, Disk, Kind, Schedule, schedule_of

SEEDS = range(60)


def _schedule(seed: int, num_faults: int = 25, disk: Disk | None = None) -> Schedule:
    return schedule_of(seed, num_faults, PACES["long"], disk)


def test_the_same_seed_gives_the_same_schedule() -> None:
    for seed in SEEDS:
        assert _schedule(seed) == _schedule(seed)
    assert len({str(_schedule(seed)) for seed in SEEDS}) == len(SEEDS)


def test_a_schedule_is_the_one_that_its_seed_has_always_had() -> None:
    """A line to replay a failure is worth nothing otherwise."""
    assert str(schedule_of(2, 5, PACES["short"])).splitlines() == [
        "seed 2: 3 workers on ext4, stopped while storage is full in the end",
        "1. after 13 steps: kill the controller, scaled to 2",
        "2. after 8 steps: storage is full for 4.8 s",
        "3. after 9 steps: storage hangs for 4.9 s",
        "4. meanwhile: kill a member and its buddy",
        "5. after 7 steps: storage is read-only for 3.8 s",
    ]


@pytest.mark.parametrize("num_faults", [1, 4, 5, 25])
def test_at_least_half_of_the_faults_are_of_storage(num_faults: int) -> None:
    for seed in SEEDS:
        faults = _schedule(seed, num_faults).faults
        assert [fault.number for fault in faults] == list(range(1, num_faults + 1))
        assert 2 * sum(fault.kind.is_of_storage for fault in faults) >= num_faults


def test_every_kind_of_fault_and_of_end_occurs() -> None:
    schedules = [_schedule(seed, disk=disk) for seed in SEEDS for disk in (None, Disk.FUSE, Disk.REMOVABLE)]
    assert {fault.kind for schedule in schedules for fault in schedule.faults} == set(Kind)
    assert {schedule.disk for schedule in schedules} == set(Disk)
    assert {schedule.stops_when_full for schedule in schedules} == {False, True}
    sizes = {fault.workers for schedule in schedules for fault in schedule.faults}
    assert sizes == {None, *range(LEAST_WORKERS, MOST_WORKERS + 1)}


def test_within_a_fault_of_storage_at_most_one_other_happens_and_it_happens_at_once() -> None:
    """Two faults of storage at once can't be told apart, and a file system can't be filled while it hangs."""
    within = 0
    for seed in SEEDS:
        faults = _schedule(seed).faults
        assert not faults[0].is_within
        for before, fault in pairwise(faults):
            if fault.is_within:
                within += 1
                assert before.kind.is_of_storage and not before.is_within
                assert not fault.kind.lasts and fault.after_steps == 0 and fault.workers is None
    assert within


@pytest.mark.parametrize(
    ("disk", "kinds"),
    [
        (Disk.TMPFS, {Kind.FULL, Kind.READ_ONLY}),
        (Disk.EXT4, {Kind.FULL, Kind.READ_ONLY, Kind.HUNG}),
        (Disk.FUSE, {Kind.FULL, Kind.READ_ONLY, Kind.HUNG, Kind.FAILING, Kind.SLOW}),
        (Disk.REMOVABLE, {Kind.FULL, Kind.READ_ONLY, Kind.HUNG, Kind.UNMOUNTED}),
    ],
    ids=["tmpfs", "ext4", "fuse", "removable"],
)
def test_a_disk_has_the_faults_that_can_be_made_to_it(disk: Disk, kinds: set[Kind]) -> None:
    for seed in SEEDS:
        schedule = _schedule(seed, disk=disk)
        assert schedule.disk is disk
        assert {fault.kind for fault in schedule.faults if fault.kind.is_of_storage} == kinds


def test_only_faults_that_last_have_seconds() -> None:
    shortest, longest = PACES["long"].seconds
    for fault in (fault for seed in SEEDS for fault in _schedule(seed).faults):
        assert shortest <= fault.seconds <= longest if fault.kind.lasts else fault.seconds == 0


def test_a_fault_of_storage_is_alone_unless_something_else_happens_meanwhile() -> None:
    for seed in SEEDS:
        schedule = _schedule(seed)
        for fault, following in zip(schedule.faults, [*schedule.faults[1:], None], strict=True):
            is_alone = fault.kind.is_of_storage and fault.workers is None
            assert schedule.is_alone(fault) == (is_alone and not (following and following.is_within))
