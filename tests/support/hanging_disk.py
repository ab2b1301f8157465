"""A disk whose calls hang for as long as a test likes: a frozen ext4, or a file system by FUSE. Needs root."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.support.call_faults import CallFault, Effect
from tests.support.disk import ext4_disk, frozen
from tests.support.fuse_disk import fuse_disk


@dataclass(frozen=True)
class HangingDisk:
    """A disk, and what lets its calls hang: on ext4 those that write, by FUSE all of them. Threads in them can't be
    killed."""

    path: Path
    hanging: Callable[[], AbstractContextManager[None]]


@contextmanager
def hanging_disk(kind: str, place: Path, megabytes: int) -> Iterator[HangingDisk]:
    """A disk (`ext4` or `fuse`) of that size at `place`, while this lasts. Skips the test where there can be none."""
    match kind:
        case "ext4":
            with ext4_disk(place, megabytes) as path:
                yield HangingDisk(path, partial(frozen, path))
        case "fuse":
            with fuse_disk(place, megabytes) as disk:
                yield HangingDisk(disk.path, partial(disk.having, CallFault("*", Effect.HANG)))
        case _:
            raise ValueError(f"a disk of kind {kind!r} can't hang; those of kind ext4 and fuse can")
