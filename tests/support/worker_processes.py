"""Processes of Ray's actors on this machine, found by their titles: those of a run's workers, and others."""

import re
from collections.abc import Iterable
from contextlib import suppress

import psutil


def workers_of(run: str, processes: Iterable[psutil.Process] | None = None) -> dict[str, psutil.Process]:
    """Workers by name, among these processes or all of the machine.

    A process that a worker starts has the worker's title until it loads its own program, which may take long on a busy
    machine: a child of an actor is left out.
    """
    found: dict[str, psutil.Process] = {}
    for process in psutil.process_iter() if processes is None else processes:
        match = re.match(rf"ray::worker {run}/(\w+)", title_of(process))
        if match and not is_child_of_actor(process):
            found[match[1]] = process
    return found


def pid_of_actor(title: str) -> int:
    """Of the actor with this title among the processes that this one has started. AssertionError if there is none, or
    more than one."""
    shown = re.compile(rf"{re.escape(title)}(\..*)?")  # with the method, during a call
    titled = [p for p in psutil.Process().children(recursive=True) if shown.fullmatch(title_of(p))]
    found = [p.pid for p in titled if not is_child_of_actor(p)]
    assert len(found) == 1, f"processes of {title}: {found}"
    return found[0]


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


def is_child_of_actor(process: psutil.Process) -> bool:
    """Whether it is one that an actor has started, and not an actor itself."""
    with suppress(psutil.Error):
        return title_of(psutil.Process(process.ppid())).startswith("ray::")
    return False
