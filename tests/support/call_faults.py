"""Faults of a file system's calls: which calls, and what becomes of them."""

import errno
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatch
from typing import Any

LONGEST_HANG_S = 600.0  # then it fails: a test that is over leaves no process that can't be killed


class Effect(StrEnum):
    """What becomes of a call."""

    HANG = "does not return while the fault lasts"
    DELAY = "takes longer"
    ERROR = "is not made, and fails"
    LOST_REPLY = "is made, and fails"
    TORN = "writes the first half of its bytes, and fails"
    FLIPPED = "reads or writes with a bit changed"


@dataclass(frozen=True)
class CallFault:
    """A fault of some calls.

    Args:
        call: operation of FUSE, such as `write` or `fsync`; `*` stands for all.
        name: pattern of the file's path, of a new name in `link` and the old one in `rename`. It is hidden while the
            product writes it: `*.partial`.
        nth: which of these calls, from 1; 0: all.
        number: errno of calls that fail.
        seconds: of a delay.
    """

    call: str
    effect: Effect
    name: str = "*"
    nth: int = 0
    number: int = errno.EIO
    seconds: float = 0.0

    @property
    def error(self) -> OSError:
        return OSError(self.number, os.strerror(self.number))


class ArmedFaults:
    """Those that happen now, in all threads that make calls.

    Attributes:
        hits: calls that faults have happened to since these were armed.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._calls: dict[CallFault, int] = {}  # of each fault, the calls that match it so far
        self.hits = 0

    def arm(self, faults: Sequence[CallFault]) -> None:
        """From now on these faults happen and no earlier ones: calls that hang because of one are made."""
        with self._changed:
            self._calls, self.hits = dict.fromkeys(faults, 0), 0
            self._changed.notify_all()

    def make(self, call: str, path: str, function: Callable[..., Any], *args: Any) -> Any:
        """Make a call, with what is to become of it. Bytes to write are its first argument.

        Raises:
            OSError: by the call, or by a fault.
        """
        fault = self._due(call, path)
        match fault and fault.effect:
            case Effect.HANG:
                self._await_end(fault)
            case Effect.DELAY:
                time.sleep(fault.seconds)
            case Effect.ERROR:
                raise fault.error
            case Effect.LOST_REPLY:
                function(*args)
                raise fault.error
            case Effect.TORN:
                function(args[0][: len(args[0]) // 2], *args[1:])
                raise fault.error
            case Effect.FLIPPED:
                return function(_flipped(args[0]), *args[1:]) if call == "write" else _flipped(function(*args))
        return function(*args)

    def _due(self, call: str, path: str) -> CallFault | None:
        with self._changed:
            for fault in self._calls:
                if fault.call in ("*", call) and fnmatch(path, fault.name):
                    self._calls[fault] += 1
                    if fault.nth in (0, self._calls[fault]):
                        self.hits += 1
                        return fault
        return None

    def _await_end(self, fault: CallFault) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: fault not in self._calls, LONGEST_HANG_S):
                raise fault.error


def _flipped(data: bytes) -> bytes:
    changed, middle = bytearray(data), len(data) // 2
    changed[middle : middle + 1] = (byte ^ 1 for byte in changed[middle : middle + 1])  # none, of none
    return bytes(changed)
