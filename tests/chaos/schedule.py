"""Schedule of a chaos run: the faults that a seed stands for. Pure: the same arguments give the same schedule.

A fault happens a number of committed steps after the run has gone on from the one before, so that the same seed meets a
run in about the same states on any machine.
"""

import math
from dataclasses import dataclass
from enum import StrEnum
from random import Random

LEAST_WORKERS, MOST_WORKERS = 1, 3


class Kind(StrEnum):
    """Faults of storage last for some seconds, and so does the frozen worker; the others happen at once."""

    FULL = "storage is full"
    HUNG = "storage hangs"
    READ_ONLY = "storage is read-only"
    KILL_MEMBER = "kill a member"
    KILL_PAIR = "kill a member and its buddy"
    KILL_STANDBY = "kill the standby"
    FREEZE_MEMBER = "freeze a member"
    KILL_CONTROLLER = "kill the controller"
    KILL_SCHEDULER = "kill the Scheduler"
    KILL_TRACKER = "kill the tracker"
    KILL_STORAGE_PROCESS = "kill the controller's storage process"
    FAILING = "storage fails all calls"
    SLOW = "storage is slow"
    UNMOUNTED = "storage is not mounted"

    @property
    def is_of_storage(self) -> bool:
        return self in (Kind.FULL, Kind.HUNG, Kind.READ_ONLY, Kind.FAILING, Kind.SLOW, Kind.UNMOUNTED)

    @property
    def lasts(self) -> bool:
        return self.is_of_storage or self is Kind.FREEZE_MEMBER


class Disk(StrEnum):
    """File system of run storage. A tmpfs can't be frozen, only one by FUSE fails calls on request, and only the
    removable one, an ext4, is sometimes not mounted."""

    EXT4 = "ext4"
    TMPFS = "tmpfs"
    FUSE = "fuse"
    REMOVABLE = "removable"

    def has(self, kind: Kind) -> bool:
        """Whether a fault of storage can be made to it."""
        if kind in (Kind.FAILING, Kind.SLOW):
            return self is Disk.FUSE
        if kind is Kind.UNMOUNTED:
            return self is Disk.REMOVABLE
        return kind is not Kind.HUNG or self is not Disk.TMPFS


@dataclass(frozen=True)
class Fault:
    """One fault.

    Args:
        number: from 1.
        after_steps: committed steps since the run went on from the fault before.
        seconds: how long it lasts; 0 if it happens at once.
        pick: number that chooses among members, by rank.
        is_within: it happens in the middle of the storage fault before it, and `after_steps` is 0.
        workers: a request for this many workers is made in the middle of it, or right before it if it happens at once.
    """

    number: int
    kind: Kind
    after_steps: int
    seconds: float
    pick: int
    is_within: bool = False
    workers: int | None = None

    def __str__(self) -> str:
        lasts = f" for {self.seconds:.1f} s" if self.seconds else ""
        when = "meanwhile" if self.is_within else f"after {self.after_steps} steps"
        scaled = "" if self.workers is None else f", scaled to {self.workers}"
        return f"{self.number}. {when}: {self.kind}{lasts}{scaled}"


@dataclass(frozen=True)
class Pace:
    """Bounds of the steps between faults, and of the seconds that they last."""

    steps: tuple[int, int]
    seconds: tuple[float, float]


PACES = {"short": Pace((5, 15), (3.0, 5.0)), "long": Pace((10, 80), (3.0, 12.0))}


@dataclass(frozen=True)
class Schedule:
    """All that happens to one run.

    Args:
        stops_when_full: the request that ends the run is made while storage is full.
    """

    seed: int
    disk: Disk
    workers: int
    faults: tuple[Fault, ...]
    stops_when_full: bool

    def __str__(self) -> str:
        ends = "stopped while storage is full" if self.stops_when_full else "stopped"
        lines = [f"seed {self.seed}: {self.workers} workers on {self.disk}, {ends} in the end"]
        return "\n".join([*lines, *map(str, self.faults)])

    def is_alone(self, fault: Fault) -> bool:
        """Whether nothing else happens to the run during this storage fault."""
        following = self.faults[fault.number : fault.number + 1]
        return fault.kind.is_of_storage and fault.workers is None and not any(f.is_within for f in following)


def schedule_of(seed: int, num_faults: int, pace: Pace, disk: Disk | None = None) -> Schedule:
    """The schedule of a seed. At least half of its faults are of storage.

    Args:
        disk: None: an ext4 or a tmpfs, by the seed.
    """
    random = Random(f"chaos {seed}")
    drawn = random.choice([Disk.EXT4, Disk.EXT4, Disk.TMPFS])
    disk = disk or drawn
    of_storage = [kind for kind in Kind if kind.is_of_storage and disk.has(kind)]
    of_processes = [kind for kind in Kind if not kind.is_of_storage]
    num_of_storage = math.ceil(num_faults / 2)
    kinds = _drawn(random, of_storage, num_of_storage) + _drawn(random, of_processes, num_faults - num_of_storage)
    random.shuffle(kinds)
    faults: list[Fault] = []
    for number, kind in enumerate(kinds, 1):
        before = faults[-1].kind if faults else kind
        is_within = before.is_of_storage and not kind.lasts and random.random() < 0.5
        fault = Fault(
            number=number,
            kind=kind,
            after_steps=0 if is_within else random.randint(*pace.steps),
            seconds=round(random.uniform(*pace.seconds), 1) if kind.lasts else 0.0,
            pick=random.randrange(MOST_WORKERS),
            is_within=is_within,
            workers=None if is_within or random.random() < 0.7 else random.randint(LEAST_WORKERS, MOST_WORKERS),
        )
        faults.append(fault)
    workers = random.randint(LEAST_WORKERS, MOST_WORKERS)
    return Schedule(seed, disk, workers, tuple(faults), stops_when_full=random.random() < 0.4)


def _drawn(random: Random, kinds: list[Kind], count: int) -> list[Kind]:
    """Each kind as often as any other, give or take one."""
    drawn: list[Kind] = []
    while len(drawn) < count:
        drawn += random.sample(kinds, len(kinds))
    return drawn[:count]
