"""One write of a rank's part of a checkpoint, from the copy of the live shard to the report, in a thread of its own."""

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from orchestrator.checkpoint.shard_image import ShardImage, ShardMemory
from orchestrator.protocol.worker_report import ShardWritten
from orchestrator.storage.condition import AWAY_AFTER_S, StorageTrouble, refusal, unanswered

log = logging.getLogger("orchestrator.worker")

LATE_AFTER_S = 5.0  # of a write: the run's last checkpoint waits that long for an earlier one
SLOW_BYTES_PER_S = 20e6  # of storage to which a large shard takes longer than that, though it is well
AGAIN_S = 1.0  # until a refused write is repeated
NO_ROOM = (OSError, MemoryError, RuntimeError)  # for a copy: of the system, of Python and torch, and no further thread


class ShardWrite(threading.Thread):
    """Copies one shard, then attempts to write it, until one attempt succeeds or it is given up.

    Args:
        copy: makes the copy.
        attempt: to write its image.
        is_verified: it may be reported once it is written.
    """

    def __init__(
        self,
        copy: Callable[[], ShardMemory],
        attempt: Callable[[ShardImage], ShardWritten],
        done: Callable[[ShardWritten], None],
        refused: Callable[[StorageTrouble | None], None],
        failed: Callable[[Exception], None],
        is_verified: bool,
    ) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self._copy = copy
        self._attempt, self._done, self._refused, self._failed = attempt, done, refused, failed
        self._began_s = float("inf")  # when the first attempt began
        self._awaited_s = float("inf")  # when the training thread began to wait for the copy
        self._copy_s = 0.0  # training time that the copy took: that wait, and processor time
        self._reporting = threading.Lock()  # nothing is reported once it is given up
        self._was_refused = False
        self._is_slow = False  # and that is reported
        self._given_up = threading.Event()
        self._is_verified = is_verified
        self._written: ShardWritten | None = None
        self._is_copied = threading.Event()
        self.lacks_room = False  # for the copy
        self.has_written = False

    def wait_for_copy(self) -> None:
        """Wait until the copy is made, or has failed. Called by the training thread."""
        if not self._is_copied.is_set():
            self._awaited_s = min(self._awaited_s, time.monotonic())
            self._is_copied.wait()

    @property
    def is_late(self) -> bool:
        return self.is_alive() and (self._was_refused or time.monotonic() - self._began_s > LATE_AFTER_S)

    @property
    def is_unverified(self) -> bool:
        return not self._is_verified and not self._given_up.is_set()

    def verify(self) -> None:
        with self._reporting:
            self._is_verified = True
            self._report()

    def give_up(self) -> None:
        """Make no further attempt, and report none."""
        with self._reporting:
            self._given_up.set()
            if (self._was_refused or self._is_slow) and not self.has_written:
                self._refused(None)

    def run(self) -> None:
        try:
            memory = self._copied()
        finally:
            self._is_copied.set()
        if memory is None:
            return
        self._began_s = time.monotonic()
        with memory, self._watched(memory.image):
            while not self._given_up.is_set() and not self._is_over(memory.image):
                self._given_up.wait(AGAIN_S)

    @contextmanager
    def _watched(self, image: ShardImage) -> Iterator[None]:
        """Report that storage takes too long for this image, while attempts are made: a call may not return."""
        patience_s, is_over = LATE_AFTER_S + image.num_bytes / SLOW_BYTES_PER_S, threading.Event()

        def watch() -> None:
            for after_s in (patience_s, patience_s + AWAY_AFTER_S):
                if is_over.wait(self._began_s + after_s - time.monotonic()):
                    return
                self._report_slow(unanswered(after_s, patience_s))

        threading.Thread(target=watch, name="checkpoint watch", daemon=True).start()
        try:
            yield
        finally:
            is_over.set()

    def _report_slow(self, trouble: StorageTrouble) -> None:
        with self._reporting:
            if not (self._was_refused or self._given_up.is_set() or self._written is not None):
                self._is_slow = True
                self._refused(replace(trouble, why=f"a checkpoint isn't written yet: {trouble.why}"))

    def _copied(self) -> ShardMemory | None:
        """The copy; None if it can't be made. Nothing here refers to the shard's memory afterwards."""
        try:
            return self._copy()
        except NO_ROOM as error:
            log.warning("no part of a checkpoint from this rank: its state could not be copied: %s", error)
            self.lacks_room = True
        except Exception as error:
            self._failed(error)
        finally:
            self._copy_s = max(0.0, time.monotonic() - self._awaited_s) + time.thread_time()
            del self._copy
        return None

    def _is_over(self, image: ShardImage) -> bool:
        """Make one attempt. Returns whether it was the last one."""
        try:
            written = self._attempt(image)
        except (OSError, MemoryError) as error:
            error = error if isinstance(error, OSError) else OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
            with self._reporting:
                self._was_refused = True
                if not self._given_up.is_set():
                    self._refused(refusal("a checkpoint can't be written", error))
            return False
        except Exception as error:  # of any kind: the end of the run waits for every shard
            self._failed(error)
            return True
        with self._reporting:
            self._written = replace(written, cost_s=self._copy_s + written.cost_s)
            self._report()
        return True

    def _report(self) -> None:
        """Report what is written, if it is and may count: the checkpoint of one that was given up may be deleted."""
        if self._written is not None and self._is_verified and not self._given_up.is_set() and not self.has_written:
            self.has_written = True
            self._done(self._written)
