"""Processes that we started, distinguished by their start from others with a reused pid."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

KILL_TIMEOUT_S = 5.0
ROUNDS = 5
PROC = Path("/proc")
BOOT_ID = PROC / "sys" / "kernel" / "random" / "boot_id"


@dataclass(frozen=True)
class Process:
    """A process of this machine. `started` is its start, which no setting of the clock changes; with the pid it
    identifies one process."""

    pid: int
    started: str
    name: str


def describe(process: psutil.Process, name: str | None = None) -> Process:
    """What identifies a process, with its own name or this one.

    Raises:
        psutil.NoSuchProcess: it is gone.
    """
    return Process(process.pid, _started(process), process.name() if name is None else name)


def is_running(recorded: Process) -> bool:
    """Whether exactly this process runs; a zombie does not."""
    return _find(recorded) is not None


def living_of(leader: Process, recorded: Iterable[Process]) -> list[psutil.Process]:
    """Living processes of `leader`'s session: the recorded ones, their descendants, the session's members.

    If another process has reused the leader's pid, the session of that id is foreign, and is left alone.
    """
    roots = [process for process in map(_find, recorded) if process is not None]
    found = {process.pid: process for process in roots}
    for root in roots:
        found |= {child.pid: child for child in _descendants(root)}
    if not _is_stranger(leader):
        found |= {process.pid: process for process in _session(leader)}
    return list(found.values())


def end_session(leader: Process, recorded: Iterable[Process]) -> tuple[Process, ...]:
    """Kill the whole session, the leader first, until nothing is left. Returns the processes that did not end.

    SIGTERM is not used: Ray's head answers it by draining for 30 s while its actors continue, and restarts actors that
    end before it does.
    """
    known = tuple(recorded)
    for _ in range(ROUNDS):
        alive = living_of(leader, known)
        if not alive:
            return ()
        for process in sorted(alive, key=lambda process: process.pid != leader.pid):
            try:
                process.kill()  # psutil checks the start time once more
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(alive, timeout=KILL_TIMEOUT_S)
    return tuple(describe(process) for process in living_of(leader, known))


def _find(recorded: Process) -> psutil.Process | None:
    try:
        process = psutil.Process(recorded.pid)
        return process if _same(process, recorded) and _alive(process) else None
    except psutil.NoSuchProcess:
        return None


def _is_stranger(recorded: Process) -> bool:
    """Whether the pid belongs to another process now. A zombie still is the recorded one."""
    try:
        return not _same(psutil.Process(recorded.pid), recorded)
    except psutil.NoSuchProcess:
        return False


def _same(process: psutil.Process, recorded: Process) -> bool:
    return _started(process) == recorded.started


def _started(process: psutil.Process) -> str:
    """On Linux the boot, and the clock ticks since then (field 22 in proc_pid_stat(5)). psutil adds these to the time
    of the boot, which moves when the clock is set, as after a virtual machine stood still: a living process seemed to
    be another one. Other systems keep the time itself."""
    try:
        stat = (PROC / str(process.pid) / "stat").read_text()
        return f"{BOOT_ID.read_text().strip()}/{stat.rpartition(')')[2].split()[19]}"
    except (FileNotFoundError, ProcessLookupError):
        return f"{process.create_time():.3f}"


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [child for child in process.children(recursive=True) if _alive(child)]
    except psutil.NoSuchProcess:
        return []


def _session(leader: Process) -> list[psutil.Process]:
    """Members of the leader's session, including those whose parents are gone."""
    return [process for process in psutil.process_iter() if _session_id(process.pid) == leader.pid and _alive(process)]


def _session_id(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:  # gone meanwhile, or not ours to ask
        return None


def _alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
