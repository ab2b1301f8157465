"""Copies from a GPU to host memory beside the computation, on a stream of their own."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StreamCopies:
    """Orders copies after the computation that makes their values. On a CPU, where nothing runs beside the host, it
    does nothing.

    Args:
        device: from which the copies are.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def mark(self) -> torch.cuda.Event | None:
        """The present end of the computation. Call in the thread that computes."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event

    @contextmanager
    def after(self, mark: torch.cuda.Event | None) -> Iterator[None]:
        """Copies in this block read what was computed before `mark`, and are complete at its end. In any thread. What
        they read must not change meanwhile, and must be referred to until the end."""
        if self._stream is None or mark is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(mark)
            try:
                yield
            finally:  # after an error too: copies that were begun still write to memory that others may get next
                self._stream.synchronize()
