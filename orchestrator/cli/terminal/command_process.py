"""A command in a child process, so that a signal ends it also while a call to a file system doesn't return.

A process is gone only once all its threads have left the kernel. One that reads a mount which hangs may stay there for
as long as that does, whatever signal it gets. So the parent, which makes no such call, waits for the child, passes
signals on, and leaves behind a child that can't end: that one ends when its call returns.
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from orchestrator.cli.terminal import signals
from orchestrator.errors import StorageError
from orchestrator.storage.backends.last_read import last_read

LEFT_AFTER_S = 1.0  # in the kernel, since the first signal
LOOK_S = 0.05
PR_SET_PDEATHSIG = 1  # of Linux


def in_child(command: Callable[[], None]) -> None:
    """Run the command in a child, and end this process with its exit code."""
    passed_on = {number for number in signals.NUMBERS if number != signal.SIGHUP or not signals.is_nohup()}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {*passed_on, signal.SIGCHLD})
    child = os.fork()
    if child != 0:
        os._exit(_code_of(child, passed_on))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # a parent that is killed passes nothing on
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    command()


def _code_of(child: int, passed_on: set[signal.Signals]) -> int:
    """The exit code of the child; that of the first signal if it is left behind."""
    first, looked_s = 0, 0.0  # the latter: when the child was last seen outside of the kernel
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else signals.EXIT_CODE_OF_SIGNALS + (first or -code)
        if not first or not _is_in_kernel(child):
            looked_s = time.monotonic()
        elif time.monotonic() - looked_s >= LEFT_AFTER_S:
            _show_left(child)
            return signals.EXIT_CODE_OF_SIGNALS + first
        received = signal.sigtimedwait({*passed_on, signal.SIGCHLD}, LOOK_S if first else 3600.0)
        if received is not None and received.si_signo in passed_on:
            os.kill(child, received.si_signo)
            first = first or received.si_signo


def _is_in_kernel(pid: int) -> bool:
    """Whether a process is in a call that no signal interrupts, or has ended but for a thread that is in one."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] in "DZ"
    except OSError:  # there is no such file system
        return False


def _show_left(child: int) -> None:
    from orchestrator.cli.terminal.output import show_error

    place = last_read()
    error = StorageError(
        f"{place or 'a file system'} does not answer: a call to it has not returned",
        remedy="See that it is mounted and that its server answers; "
        f"process {child}, which waits for that, ends as soon as it does.",
    )
    show_error(error)
    sys.stderr.flush()
