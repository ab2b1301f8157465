"""Child process that makes storage calls, so that its parent can be killed whatever storage does.

A thread in a call that can't be interrupted (a hung NFS server, a frozen disk) keeps its process from ending: a
controller that is killed then would be restarted only once storage answers. A thread that waits for a child doesn't.

Requests and answers are pickles, through the child's standard input and output. A child whose parent has ended ends
too, within a call: it must not go on beside the parent's successor.

A child that makes no progress in a call (no processor time, no bytes read or written) is killed, and another one makes
the call again: one request that a mount never answers must not stop all later ones. A child in a call that can't be
interrupted ends only once that returns, so there are few of them.
"""

import errno
import logging
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from logging.handlers import QueueHandler
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

log = logging.getLogger("orchestrator.storage")

MOST_STARTS = 3  # for one call
STUCK_S = 60.0  # without progress: longer than a flush of what is written at once takes on most disks
MOST_ABANDONED = 2  # children that were killed and have not ended: then storage hangs for all calls, and is waited for
LOOK_S = 1.0  # between two looks at a child's progress
ENDS_S = 1.0  # for a child that was killed


@dataclass(frozen=True)
class _Answer:
    """Outcome of a call: its result or error, and the lines that it logged."""

    result: Any
    error: Exception | None
    lines: tuple[logging.LogRecord, ...]


class StorageProcess:
    """Makes calls in a child process, one after the other. Its methods may be called from any thread.

    Args:
        title: what the child shows itself as in a list of processes, after its command.
        stuck_s: without progress, until a child is replaced. Doubled each time: the call may need that long.
    """

    def __init__(self, title: str, stuck_s: float = STUCK_S) -> None:
        self._title, self._stuck_s = title, stuck_s
        self._lock = threading.Lock()  # held during a call
        self._child: subprocess.Popen[bytes] | None = None
        self._abandoned: list[subprocess.Popen[bytes]] = []  # killed, and have not ended

    @property
    def pid(self) -> int | None:
        """Of the child; None before its first call."""
        return None if self._child is None else self._child.pid

    def call(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """The result of `function` in the child. What it logs is logged in this process.

        A call is repeated if the child ends during it, or is stuck. So it must be one that may be made twice, also at
        the same time.

        Args:
            function: picklable, like its arguments, result and errors.

        Raises:
            OSError: the child could not be started, or ended whenever it made this call.
            Exception: whatever `function` raises.
        """
        request = pickle.dumps((function, args, kwargs))
        with self._lock:
            answer = self._answer_to(request)
        for line in answer.lines:
            logging.getLogger(line.name).handle(line)
        if answer.error is not None:
            raise answer.error
        result: R = answer.result
        return result

    def close(self) -> None:
        """End the child. Doesn't wait for that."""
        if self._child is not None:
            _input_of(self._child).close()

    def _answer_to(self, request: bytes) -> _Answer:
        num_ended = 0
        while num_ended < MOST_STARTS:
            if self._child is None:
                self._child = self._start()
            try:
                pickle.dump(request, _input_of(self._child))
                _input_of(self._child).flush()
                if not self._has_answered(self._child):
                    self._abandon(self._child)
                    continue
                pickled = pickle.load(_output_of(self._child))
            except (EOFError, BrokenPipeError, pickle.UnpicklingError):  # it has ended, perhaps within an answer
                self._child.wait()
                self._child = None
                num_ended += 1
            else:
                answer: _Answer = pickle.loads(pickled)
                return answer
        raise OSError(errno.EIO, f"the process for storage calls has ended {MOST_STARTS} times during one")

    def _has_answered(self, child: "subprocess.Popen[bytes]") -> bool:
        """Wait for a child's answer, or its end. Returns False once it is stuck, unless too many were."""
        answer = select.poll()
        answer.register(_output_of(child).fileno(), select.POLLIN)
        progress, since_s = _progress_of(child.pid), time.monotonic()
        while not answer.poll(LOOK_S * 1000):
            self._abandoned = [each for each in self._abandoned if each.poll() is None]
            now = _progress_of(child.pid)
            if now is None or now != progress or len(self._abandoned) >= MOST_ABANDONED:
                progress, since_s = now, time.monotonic()
            elif time.monotonic() - since_s >= self._stuck_s:
                return False
        return True

    def _abandon(self, child: "subprocess.Popen[bytes]") -> None:
        """Kill a child that is stuck. The next call starts another one."""
        log.warning("a storage call is made again by another process: no progress for %.0f s", self._stuck_s)
        self._child, self._stuck_s = None, 2 * self._stuck_s
        child.kill()
        try:
            child.wait(ENDS_S)
        except subprocess.TimeoutExpired:  # its call can't be interrupted
            self._abandoned.append(child)

    def _start(self) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "orchestrator.storage.storage_process", self._title]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # whatever made modules known here
        return subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def _input_of(child: "subprocess.Popen[bytes]") -> Any:
    assert child.stdin is not None, "started with pipes"
    return child.stdin


def _output_of(child: "subprocess.Popen[bytes]") -> Any:
    assert child.stdout is not None, "started with pipes"
    return child.stdout


def _progress_of(pid: int) -> str | None:
    """What changes as long as a process computes, reads or writes; None where that isn't shown."""
    with suppress(OSError):
        process = Path(f"/proc/{pid}")
        times = process.joinpath("stat").read_text().rpartition(")")[2].split()[11:13]
        return " ".join([*times, process.joinpath("io").read_text()])
    return None


def _serve(requests: BinaryIO, answers: BinaryIO) -> None:
    lines: SimpleQueue[logging.LogRecord] = SimpleQueue()
    logging.getLogger().addHandler(QueueHandler(lines))
    logging.getLogger("orchestrator").setLevel(logging.INFO)
    with suppress(EOFError, BrokenPipeError):  # the parent has ended
        while True:
            request = pickle.load(requests)
            result, error = _outcome_of(request)
            said = tuple(lines.get() for _ in range(lines.qsize()))
            pickle.dump(_pickled(_Answer(result, error, said)), answers)
            answers.flush()


def _outcome_of(request: bytes) -> tuple[Any, Exception | None]:
    try:
        function, args, kwargs = pickle.loads(request)
        return function(*args, **kwargs), None
    except Exception as error:
        return None, error


def _pickled(answer: _Answer) -> bytes:
    """The answer; an error in its place if it can't be pickled, or its error not unpickled."""
    try:
        pickled = pickle.dumps(answer)
        if answer.error is not None:
            pickle.loads(pickled)
    except Exception:
        what = f"its error {answer.error!r}" if answer.error is not None else "its result"
        error = RuntimeError(f"of a storage call {what} can't be sent: {traceback.format_exc()}")
        return pickle.dumps(_Answer(None, error, answer.lines))
    return pickled


def _end_with_parent() -> None:
    """End this process once the other end of its standard input is closed. In a system call that can't be interrupted
    it ends when that returns, and makes no other."""
    parent = select.poll()
    parent.register(sys.stdin.fileno(), 0)  # poll reports a closed end even with an empty mask
    parent.poll()
    os._exit(0)


def main() -> None:
    """Serve the parent until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal; the parent decides
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a call prints is no answer
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    from orchestrator.storage.storage_process import main as serve  # answers are pickled under the module's own name

    serve()
