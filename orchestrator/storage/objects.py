"""Immutable objects under names: all that run storage has to offer, whether it is a directory or a bucket.

There is one primitive: `create` an object if its name is free. What has returned is durable, and an object is never
seen in part. On this stands a journal that only one controller can append to, without locks, renames or clocks.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


class Objects(Protocol):
    """Objects by key: a path of names, separated by `/`, below a root. Implementations have the same contract tests."""

    def create(self, key: str, data: bytes) -> bytes:
        """Store `data` under `key` if nothing is there, and flush it to the device.

        An answer that leaves open whether it was stored (an I/O error, a lost reply) is settled by reading it back.

        Returns:
            the object that is there now: equal to `data` if this call, or an earlier attempt of it, has stored it; else
            another writer's.

        Raises:
            OSError: nothing is there, and `data` could not be stored; or it is not known which.
            UsageError: this storage can't create an object conditionally.
        """
        ...

    def get(self, key: str) -> bytes:
        """The object's bytes. Raises FileNotFoundError, or OSError if it can't be read."""
        ...

    def names(self, folder: str) -> tuple[str, ...]:
        """Names of objects and folders directly below `folder`, sorted; none if it doesn't exist. Raises OSError."""
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; absent ones are skipped. Raises OSError."""
        ...


@dataclass(frozen=True)
class Written:
    """What `put` has stored. `sha256` is in hexadecimal."""

    sha256: str
    num_bytes: int


@dataclass(frozen=True, order=True)
class StoredObject:
    """An existing object, by its whole key. `written_s`: `time.time()` by the clock of storage."""

    key: str
    num_bytes: int
    written_s: float = field(default=0.0, compare=False)


class LargeObjects(Objects, Protocol):
    """Objects of which some are large: written from files, and read in parts."""

    def put(self, key: str, file: Path) -> Written:
        """Store a file's content under a key that no other content is ever stored under. May be repeated.

        Args:
            file: it may be memory, by its path in `/proc/PID/fd`.

        Raises:
            OSError: it could not be read or stored, or it is not known whether it is.
        """
        ...

    def get(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        """The object's bytes from `start` to before `stop`, or to its end if that comes first.

        Raises:
            FileNotFoundError: there is no such object.
            OSError: it can't be read.
        """
        ...

    def objects(self, folder: str) -> tuple[StoredObject, ...]:
        """All objects below `folder`, at any depth, sorted; none if it doesn't exist. Raises OSError."""
        ...
