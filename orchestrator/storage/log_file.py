"""Log lines in run storage, written by a thread: a process that logs never waits for storage.

A directory has a file for each process, to which lines are appended. Other storage has objects with the lines of some
seconds. Lines that storage doesn't take wait, `MOST_WAITING` at most; later ones are dropped.
"""

import logging
import queue
import secrets
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from logging.handlers import QueueHandler, QueueListener
from pathlib import Path

from orchestrator.errors import UsageError
from orchestrator.storage.atomic import make_folders
from orchestrator.storage.caller import Caller, call_here
from orchestrator.storage.objects import Objects

MOST_WAITING = 10_000
PART_LINES, PART_S = 500, 5.0  # of an object with lines, at most


def log_to(path: Path, caller: Caller = call_here) -> None:
    """Send the package's log lines to a file, one line per change of state. Its directory is made when needed, but not
    the one that holds that.

    Args:
        caller: makes the calls to the file system.
    """
    handler = _LogFile(path, caller)
    _listen(handler, lambda: None)


def log_to_objects(objects: Objects, folder: str) -> None:
    """Send the package's log lines to objects in `folder`, whose names sort by time."""
    handler = _LogObjects(objects, folder)
    _listen(handler, handler.store)


def _listen(handler: logging.Handler, store: Callable[[], None]) -> None:
    """Have a thread handle the package's log lines.

    Args:
        store: stores what the handler has collected.
    """
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    lines: queue.Queue[logging.LogRecord] = queue.Queue(MOST_WAITING)
    _Listener(lines, handler, store).start()
    logger = logging.getLogger("orchestrator")
    logger.addHandler(_Waiting(lines))
    logger.setLevel(logging.INFO)


def flush_logs(timeout_s: float) -> None:
    """Wait until the lines logged so far are written, or `timeout_s` are over."""
    deadline_s = time.monotonic() + timeout_s
    waiting = [handler for handler in logging.getLogger("orchestrator").handlers if isinstance(handler, _Waiting)]
    for handler in waiting:
        handler.enqueue(STORE)
    while any(handler.queue.unfinished_tasks for handler in waiting) and time.monotonic() < deadline_s:
        time.sleep(0.01)


class _Waiting(QueueHandler):
    """Queues lines. Those that a full queue doesn't take are dropped."""

    queue: "queue.Queue[logging.LogRecord]"

    def enqueue(self, record: logging.LogRecord) -> None:
        with suppress(queue.Full):
            self.queue.put_nowait(record)


STORE = logging.makeLogRecord({})  # not a line but a request to store the lines before it


class _Listener(QueueListener):
    """Thread that handles lines, and has them stored: those before a `STORE`, and after some time without others."""

    def __init__(
        self, lines: "queue.Queue[logging.LogRecord]", handler: logging.Handler, store: Callable[[], None]
    ) -> None:
        super().__init__(lines, handler)
        self._lines, self._store = lines, store

    def dequeue(self, block: bool) -> logging.LogRecord:
        while True:
            try:
                return self._lines.get(block, PART_S)
            except queue.Empty:
                self._store()

    def handle(self, record: logging.LogRecord) -> None:
        if record is STORE:
            self._store()
        else:
            super().handle(record)


class _LogFile(logging.Handler):
    """A file to which lines are appended."""

    def __init__(self, path: Path, caller: Caller) -> None:
        super().__init__()
        self._path, self._caller = path.absolute(), caller

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._caller(_append, self._path, self.format(record) + "\n")
        except Exception:  # of any kind: the thread must write later lines
            self.handleError(record)


def _append(path: Path, text: str) -> None:
    make_folders(path.parents[1], path.parent)
    with path.open("a") as file:
        file.write(text)


class _LogObjects(logging.Handler):
    """Objects, each with the lines of some seconds."""

    def __init__(self, objects: Objects, folder: str) -> None:
        super().__init__()
        self._objects, self._folder = objects, folder
        self._lines: list[str] = []  # not stored yet
        self._part: list[str] = []  # the first of them, as they were offered to storage
        self._key = ""  # of the object that these will be in: it may be there though its creation failed
        self._since_s = 0.0  # since when lines wait, or since storage refused them

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if not self._lines:
                self._since_s = time.monotonic()
            if len(self._lines) < MOST_WAITING:
                self._lines.append(self.format(record) + "\n")
            if len(self._lines) == PART_LINES or time.monotonic() - self._since_s >= PART_S:
                self.store()
        except Exception:  # of any kind: the thread must handle later lines
            self.handleError(record)

    def store(self) -> None:
        """Store the lines that were handled. Those that storage doesn't take stay."""
        while self._lines:
            if not self._part:
                self._part = self._lines[:PART_LINES]
                self._key = f"{self._folder}/{time.time_ns():020d}-{secrets.token_hex(4)}"
            try:
                self._objects.create(self._key, "".join(self._part).encode())
            except (OSError, UsageError) as error:
                print(f"log lines can't be stored: {error}", file=sys.stderr)
                self._since_s = time.monotonic()
                return
            del self._lines[: len(self._part)]
            self._part = []
