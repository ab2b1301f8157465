"""Log files in run storage, written by a thread: a process that logs never waits for storage.

Lines that storage doesn't take wait, `MOST_WAITING` at most; later ones are dropped.
"""

import logging
import queue
import time
from contextlib import suppress
from logging.handlers import QueueHandler, QueueListener
from pathlib import Path

from orchestrator.storage.caller import Caller, call_here

MOST_WAITING = 10_000


def log_to(path: Path, caller: Caller = call_here) -> None:
    """Send the package's log lines to a file, one line per change of state. Its directory is made when needed.

    Args:
        caller: makes the calls to the file system.
    """
    lines: queue.Queue[logging.LogRecord] = queue.Queue(MOST_WAITING)
    handler = _LogFile(path, caller)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    QueueListener(lines, handler).start()
    logger = logging.getLogger("orchestrator")
    logger.addHandler(_Waiting(lines))
    logger.setLevel(logging.INFO)


def flush_logs(timeout_s: float) -> None:
    """Wait until the lines logged so far are written, or `timeout_s` are over."""
    deadline_s = time.monotonic() + timeout_s
    for handler in logging.getLogger("orchestrator").handlers:
        while isinstance(handler, _Waiting) and handler.queue.unfinished_tasks and time.monotonic() < deadline_s:
            time.sleep(0.01)


class _Waiting(QueueHandler):
    """Queues lines. Those that a full queue doesn't take are dropped."""

    queue: "queue.Queue[logging.LogRecord]"

    def enqueue(self, record: logging.LogRecord) -> None:
        with suppress(queue.Full):
            self.queue.put_nowait(record)


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
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(text)
