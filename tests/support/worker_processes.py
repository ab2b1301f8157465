"""Processes of Ray's actors on this machine, found by their titles: those of a run's workers, and others.

Ray rewrites an actor's title at each call, and what is read in that moment is anything. So no test may conclude from
one look that a process isn't there: it waits until it is found, and asks the process whether it is still running.
"""

import re
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import TypeVar

import psutil

FOUND_S, LOOK_S = 60.0, 0.1

Found = TypeVar("Found")


def workers_of(run: str, processes: Iterable[psutil.Process]) -> dict[str, psutil.Process]:
    """Workers by name, among these processes: those of one Ray, as another one may have a run of the same name.

    A process that a worker starts has the worker's title until it loads its own program, which may take long on a busy
    machine: a child of an actor is left out.
    """
    found: dict[str, psutil.Process] = {}
    for process in processes:
        match = re.match(rf"ray::worker {run}/(\w+)", title_of(process))
        if match and not is_child_of_actor(process):
            found[match[1]] = process
    return found


def until_workers(
    run: str, names: Iterable[str], among: Callable[[], Iterable[psutil.Process]] | None = None
) -> dict[str, psutil.Process]:
    """Workers by name, once they are these. AssertionError if they aren't within a minute.

    Args:
        among: the processes to look at; those that this one has started without it.
    """
    wanted, among = set(names), among or partial(psutil.Process().children, recursive=True)
    return _until_found(
        lambda: workers_of(run, among()), lambda found: set(found) == wanted, f"workers {wanted} of {run}"
    )


def pid_of_actor(title: str, gcs_address: str = "") -> int:
    """Of the actor with this title among the processes that this one has started, once there is exactly one.
    AssertionError if there isn't within a minute.

    Args:
        gcs_address: of its Ray; empty where no other one has such an actor.
    """
    shown = re.compile(rf"{re.escape(title)}(\..*)?")  # with the method, during a call

    def look() -> list[psutil.Process]:
        titled = [p for p in psutil.Process().children(recursive=True) if shown.fullmatch(title_of(p))]
        return [p for p in titled if not is_child_of_actor(p) and gcs_address in _title_of_parent(p)]

    return _until_found(look, lambda found: len(found) == 1, f"one process of {title}")[0].pid


def _until_found(look: Callable[[], Found], is_wanted: Callable[[Found], bool], what: str) -> Found:
    deadline_s = time.monotonic() + FOUND_S
    while not is_wanted(found := look()):
        assert time.monotonic() < deadline_s, f"{what} not found within {FOUND_S:.0f} s, but {found}"
        time.sleep(LOOK_S)
    return found


def title_of(process: psutil.Process) -> str:
    """Its command line; empty once it has ended. Read until it is the same twice: Ray rewrites an actor's title at each
    call, and what is read in that moment is anything."""
    try:
        before, now = None, process.cmdline()
        while now != before:
            before, now = now, process.cmdline()
    except psutil.Error:
        return ""
    return " ".join(now).strip()


def is_alive(process: psutil.Process) -> bool:
    """Whether it still runs: one that has ended and was not waited for doesn't."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def is_child_of_actor(process: psutil.Process) -> bool:
    """Whether it is one that an actor has started, and not an actor itself."""
    return _title_of_parent(process).startswith("ray::")


def _title_of_parent(process: psutil.Process) -> str:
    """Of an actor it is the raylet's command line, with the address of its Ray."""
    with suppress(psutil.Error):
        return title_of(psutil.Process(process.ppid()))
    return ""
