"""The pace of real workers' steps, set by the test that leads them: on a busy machine a run of a few dozen steps may be
over before the test has done what it is about.

pace = Pace()
pace.slow_after(7)       # in the test's process: later steps begin a second late each
follow(pace.path)        # in a worker's
"""

import os
import struct
import tempfile
import time
from collections.abc import Callable
from typing import Any

FREE = 2**62  # no step is later
POLL_S = 0.005
_FORMAT = struct.Struct("qd")


class Pace:
    """Up to which step a run's workers train without delay.

    Attributes:
        is_free: whether none waits.
    """

    def __init__(self) -> None:
        self._file = tempfile.NamedTemporaryFile(prefix="pace-")  # noqa: SIM115
        self.free()

    @property
    def path(self) -> str:
        return self._file.name

    def slow_after(self, step: int, by_s: float = 1.0) -> None:
        """From now on each step after `step` begins late by so much, unless the pace is changed meanwhile."""
        self.is_free = False
        self._write(step, by_s)

    def free(self) -> None:
        """From now on no step waits."""
        self.is_free = True
        self._write(FREE, 0.0)

    def _write(self, step: int, by_s: float) -> None:
        os.pwrite(self._file.fileno(), _FORMAT.pack(step, by_s), 0)


_followed = -1  # descriptor of the file


def follow(path: str) -> None:
    """From now on steps of this process keep this pace, and no other."""
    global _followed
    if _followed < 0:
        _wrap()
    else:
        os.close(_followed)
    _followed = os.open(path, os.O_RDONLY)


def _wrap() -> None:
    from orchestrator.worker.step.train_step import TrainStep

    original: Callable[..., Any] = TrainStep.step

    def step(self: Any, shard: Any, progress: Any, *args: Any, **kwargs: Any) -> Any:
        _await_turn(progress.step + 1)
        return original(self, shard, progress, *args, **kwargs)

    TrainStep.step = step  # type: ignore[method-assign]


def _await_turn(step: int) -> None:
    began_s = time.monotonic()
    while True:
        last, by_s = _FORMAT.unpack(os.pread(_followed, _FORMAT.size, 0))
        if step <= last or time.monotonic() - began_s >= by_s:
            return
        time.sleep(POLL_S)
