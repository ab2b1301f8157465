"""libgomp's pool threads of a process: those that rest between two parallel regions."""

import os
import time
from pathlib import Path

CAN_TELL = Path(f"/proc/self/task/{os.getpid()}/syscall").exists()  # Linux only, and not in every sandbox


def pool_threads(pid: int) -> set[int]:
    """Ids of the threads that wait within libgomp. Of a process that computes nothing now, since a thread that computes
    waits there for its pool too.

    libgomp makes its system calls itself, not through libc, so a thread that waits in one of them stands in its code.
    """
    code = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        span, permissions, *_ = line.split()
        if "libgomp" in line and "x" in permissions:
            code.append(range(*(int(address, 16) for address in span.split("-"))))
    assert code, f"process {pid} has no libgomp"
    found = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        if not (words := _syscall(task).split()):
            continue
        counter = words[-1]  # where in its code; "running" has none
        if counter != "running" and any(int(counter, 16) in span for span in code):
            found.add(int(task.name))
    return found


def resting_pool_threads(pid: int, patience_s: float = 60.0) -> set[int]:
    """The same once none of the process's threads runs, since pool threads spin for a while before they rest."""
    deadline_s = time.monotonic() + patience_s
    while any(_runs(task) for task in Path(f"/proc/{pid}/task").iterdir()):
        if time.monotonic() > deadline_s:
            raise AssertionError(f"threads of process {pid} still run after {patience_s:.0f} s")
        time.sleep(0.05)
    return pool_threads(pid)


def _runs(task: Path) -> bool:
    return _syscall(task).startswith("running")


def _syscall(task: Path) -> str:
    """What the thread waits in; empty if it has just ended."""
    try:
        return (task / "syscall").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
