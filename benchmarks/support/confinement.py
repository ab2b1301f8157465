"""A limit of memory that the kernel enforces, for this process and all that it starts from then on."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
LOOK_EVERY_S = 0.05


class Confinement:
    """A control group (cgroup, version 1 or 2) of our own.

    Attributes:
        peak_bytes: the most that its processes had at one time of what the system can't take back, looked at every
            `LOOK_EVERY_S`.
    """

    def __init__(self, directory: Path, limit_bytes: int) -> None:
        self._directory, self.limit_bytes = directory, limit_bytes
        self.peak_bytes = 0
        self._ended = threading.Event()

    @property
    def kills(self) -> int:
        """How many processes the kernel has killed for want of memory."""
        for name in ("memory.events", "memory.oom_control"):
            if (path := self._directory / name).exists():
                return sum(int(line.split()[1]) for line in path.read_text().splitlines() if line[:9] == "oom_kill ")
        return 0

    def watch(self) -> None:
        while not self._ended.wait(LOOK_EVERY_S):
            stat = dict(line.split() for line in (self._directory / "memory.stat").read_text().splitlines())
            names = ("total_rss", "total_shmem") if "total_rss" in stat else ("anon", "shmem")
            self.peak_bytes = max(self.peak_bytes, sum(int(stat.get(name, 0)) for name in names))

    def end(self) -> None:
        self._ended.set()


def why_not() -> str | None:
    """Why no limit can be set here; None if one can."""
    mount = _mount()
    if mount is None or not os.access(mount, os.W_OK):
        return "a limit of memory takes Linux, root and a control group that may be written to"
    return None


@contextmanager
def confined(limit_bytes: int) -> Iterator[Confinement]:
    """This process is within from now on, and comes back at the end; what it has taken before doesn't count."""
    mount = _mount()
    assert mount is not None, why_not()
    own = next(line.split(":", 2)[2] for line in Path("/proc/self/cgroup").read_text().splitlines() if _is_ours(line))
    group = mount / f"orchestrator-{os.getpid()}"
    group.mkdir()
    confinement = Confinement(group, limit_bytes)
    try:
        name = "memory.max" if (group / "memory.max").exists() else "memory.limit_in_bytes"
        (group / name).write_text(str(limit_bytes))
        (group / "cgroup.procs").write_text(str(os.getpid()))
        watcher = threading.Thread(target=confinement.watch, name="memory", daemon=True)
        watcher.start()
        yield confinement
    finally:
        confinement.end()
        home = mount / own.lstrip("/")
        for pid in (group / "cgroup.procs").read_text().split():
            (home if home.is_dir() else mount).joinpath("cgroup.procs").write_text(pid)
        watcher.join()
        group.rmdir()


def _mount() -> Path | None:
    return next((path for path in (ROOT / "memory", ROOT) if (path / "cgroup.procs").exists()), None)


def _is_ours(line: str) -> bool:
    controllers = line.split(":", 2)[1]
    return "memory" in controllers.split(",") if (ROOT / "memory").is_dir() else not controllers
