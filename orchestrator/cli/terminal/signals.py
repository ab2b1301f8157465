"""Signals that end a command: Ctrl-C (SIGINT), SIGTERM, and SIGHUP when its terminal is closed."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODE_OF_SIGNALS = 128  # plus the signal's number, as shells report it

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

AT_ONCE_S = 1.0  # a signal to a process group reaches a command, and its parent, which passes it on

_received: dict[int, float] = {}  # by signal, when it came last


def install() -> None:
    """Have these signals raise KeyboardInterrupt, so that a command ends what it has started and then itself.

    A shell script that starts a command in the background has SIGINT ignored: without a handler it would never arrive.
    An ignored SIGHUP stays ignored, as `nohup` wants it.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    if not is_nohup():
        signal.signal(signal.SIGHUP, _interrupt)


def is_nohup() -> bool:
    """Whether SIGHUP is ignored."""
    return signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def ignore() -> None:
    """Ignore these signals from now on, in a command that is about to end."""
    for number in NUMBERS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def ignored() -> Iterator[None]:
    """Ignore these signals while a command ends what it has started: a second Ctrl-C would leave the rest of it."""
    handlers = [signal.getsignal(number) for number in NUMBERS]
    ignore()
    try:
        yield
    finally:
        for number, handler in zip(NUMBERS, handlers, strict=True):
            signal.signal(number, handler)


def exit_code() -> int:
    """Exit code of a command that ended because of a signal."""
    return EXIT_CODE_OF_SIGNALS + next(iter(_received), signal.SIGINT)


def _interrupt(number: int, frame: FrameType | None) -> None:
    now_s = time.monotonic()
    is_new = now_s - _received.get(number, -AT_ONCE_S) >= AT_ONCE_S
    _received[number] = now_s
    if is_new:
        raise KeyboardInterrupt
