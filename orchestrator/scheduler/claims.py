"""Claims on runs: one request at a time submits, resumes or removes a run."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from orchestrator.errors import UsageError


class RunClaims:
    """Claims of one cluster. Methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: Counter[str] = Counter()  # by run

    @contextmanager
    def claim(self, run_id: str) -> Iterator[None]:
        """Refuse all other claims of this run while the block runs. Raises UsageError if there is one."""
        with self._lock:
            if self._held[run_id]:
                raise UsageError(
                    f"run {run_id} is being submitted, resumed or removed by another request",
                    remedy="Try again in a moment.",
                    unchanged="Nothing was changed.",
                )
            self._held[run_id] += 1
        try:
            yield
        finally:
            self._release(run_id)

    @contextmanager
    def extended(self, run_id: str) -> Iterator[None]:
        """Extend a claim to this block, which may outlast it: its caller doesn't wait for storage that hangs."""
        with self._lock:
            self._held[run_id] += 1
        try:
            yield
        finally:
            self._release(run_id)

    def _release(self, run_id: str) -> None:
        with self._lock:
            self._held[run_id] -= 1
            if not self._held[run_id]:
                del self._held[run_id]
