"""Condition of run storage, by the errors of calls to it and by how long they take."""

import errno
from dataclasses import dataclass
from enum import StrEnum

AWAY_AFTER_S = 25.0  # beyond the patience with a call, by when slow storage counts as away

_CONDITIONS = {
    errno.ENOSPC: "full",
    errno.EDQUOT: "full",
    errno.EROFS: "read_only",
    errno.EACCES: "read_only",
    errno.EPERM: "read_only",
    errno.EBUSY: "slow",
}


class StorageCondition(StrEnum):
    """What run storage is like now."""

    WELL = "well"
    SLOW = "slow"  # it has not answered for some seconds, or asks for fewer requests
    FULL = "full"
    READ_ONLY = "read_only"  # it refuses writes
    AWAY = "away"  # it has not answered for long, or answers with errors


@dataclass(frozen=True)
class StorageTrouble:
    """A condition of run storage that isn't `WELL`, and how it shows."""

    condition: StorageCondition
    why: str


def refusal(what: str, error: OSError) -> StorageTrouble:
    """The trouble of storage where `what` can't be done because of `error`."""
    condition = StorageCondition(_CONDITIONS.get(error.errno or 0, "away"))
    return StorageTrouble(condition, f"{what}: {error.strerror or error}")


def unanswered(open_s: float, patience_s: float) -> StorageTrouble:
    """The trouble of storage that has not answered a call for `open_s` seconds, more than the patience with it."""
    condition = StorageCondition.SLOW if open_s < patience_s + AWAY_AFTER_S else StorageCondition.AWAY
    return StorageTrouble(condition, f"run storage has not answered for {open_s:.0f} s")
