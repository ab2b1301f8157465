"""A local cluster of one's own, seen from outside: through its command, its processes, and Ray's list of placement
groups."""

import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.support.worker_processes import is_alive, is_child_of_actor, title_of, workers_of

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-m", "orchestrator.cli.main")
JSON = ("-o", "json")
COMMAND_S = 120.0  # for a command on a busy machine; one that takes longer hangs
STORAGE_PROCESS = "orchestrator.storage.storage_process"
LIST_GROUPS = """
import json, ray
from ray.util import placement_group_table
ray.init(logging_level="ERROR", log_to_driver=False)
print(json.dumps([group["state"] for group in placement_group_table().values()]))
"""


@dataclass(frozen=True)
class Answer:
    """Outcome of a command: its exit code, its output as JSON, and how long it took."""

    code: int
    value: Any
    error: str
    seconds: float


class Cluster:
    """The cluster that `home` records."""

    def __init__(self, home: Path) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        own = {"PYTHONPATH": str(ROOT), "ORCHESTRATOR_HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0"}
        self._env = {**kept, **own}
        self._record: dict[str, Any] = {}
        self._verbs: subprocess.Popen[bytes] | None = None

    def up(self, cpus: int) -> None:
        self._record = self.expect("cluster", "up", "--cpus", str(cpus)).value

    def down(self) -> list[str]:
        """End it. Returns what is left of its processes, by title."""
        processes = self.processes()
        self._end_verbs()
        self("cluster", "down", "--force")
        _, alive = psutil.wait_procs(processes, timeout=60.0)
        return [title_of(process) for process in alive]

    def __call__(self, *args: str, timeout_s: float = COMMAND_S) -> Answer:
        """Run `orchestrator ARGS`. A command that hangs has exit code -1."""
        began_s = time.monotonic()
        try:
            done = subprocess.run([*COMMAND, *args], env=self._env, capture_output=True, text=True, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return Answer(-1, None, f"no answer within {timeout_s} s", timeout_s)
        value = json.loads(done.stdout) if args[-2:] == JSON and done.stdout else None
        return Answer(done.returncode, value, done.stderr.strip()[-500:], time.monotonic() - began_s)

    def expect(self, *args: str) -> Answer:
        """The same with JSON as output, for a command that must succeed."""
        answer = self(*args, *JSON)
        if answer.code != 0:
            raise RuntimeError(f"{args} ended with {answer.code}: {answer.error}")
        return answer

    def ask(self, verb: str, run: str, *args: int) -> Answer:
        """Make a request of a user in a process that is connected already. One that hangs has exit code -1."""
        if self._verbs is None:
            command = [sys.executable, "-m", "tests.chaos.verbs"]
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            self._verbs = subprocess.Popen(command, env=self._env, **pipes)
        assert self._verbs.stdin is not None and self._verbs.stdout is not None
        self._verbs.stdin.write(json.dumps([verb, run, *args]).encode() + b"\n")
        self._verbs.stdin.flush()
        ready, _, _ = select.select([self._verbs.stdout], [], [], COMMAND_S)
        line = self._verbs.stdout.readline() if ready else b""
        if not line:
            self._end_verbs()
            return Answer(
                -1, None, f"no answer within {COMMAND_S} s" if not ready else "the asking process ended", COMMAND_S
            )
        return Answer(**json.loads(line))

    def _end_verbs(self) -> None:
        if self._verbs is not None:
            self._verbs.kill()
            self._verbs.wait()
            self._verbs = None

    def placement_groups(self) -> list[str]:
        """States of those that are not removed."""
        ray = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": self._record["token_path"],
            "RAY_ADDRESS": self._record["address"],
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        }
        listed = subprocess.run(
            [sys.executable, "-c", LIST_GROUPS], env=self._env | ray, capture_output=True, text=True, check=True
        )
        return [state for state in json.loads(listed.stdout.splitlines()[-1]) if state != "REMOVED"]

    def processes(self) -> list[psutil.Process]:
        """Living processes of this cluster: those of the head's session and their descendants, and no others."""
        if not self._record:
            return []
        head = self._record["head"]["pid"]
        found: dict[int, psutil.Process] = {}
        for process in psutil.process_iter():
            if session_of(process) == head:
                found[process.pid] = process
        for process in list(found.values()):
            found |= {child.pid: child for child in children_of(process)}
        return [process for process in found.values() if is_alive(process)]

    def of_run(self, run: str) -> list[psutil.Process]:
        """Processes that work for a run."""
        return [process for process in self.processes() if re.search(rf"\b{run}\b", title_of(process))]

    def workers(self, run: str) -> dict[str, psutil.Process]:
        """The run's workers, by name."""
        return workers_of(run, self.processes())

    def titled(self, title: str) -> list[psutil.Process]:
        """Processes whose title begins with this, in any case: until its first call an actor has its class's name."""
        titled = [process for process in self.processes() if title_of(process).lower().startswith(title.lower())]
        return [process for process in titled if not is_child_of_actor(process)]

    def actor(self, title: str) -> psutil.Process:
        """The process with this title, such as `ray::scheduler`; waits for one that is being replaced."""
        return self._await(lambda: self.titled(title), title)

    def controller(self, run: str) -> psutil.Process:
        """Found by its child, as its own title changes during calls."""
        parent = self.storage_process(run).parent()
        assert parent is not None and parent in self.processes(), parent
        return parent

    def storage_process(self, run: str) -> psutil.Process:
        """That of the run's controller."""
        end = f"{STORAGE_PROCESS} controller {run}"
        return self._await(lambda: [process for process in self.processes() if _serves(process, end)], end)

    def _await(self, look: Callable[[], list[psutil.Process]], what: str) -> psutil.Process:
        deadline_s = time.monotonic() + COMMAND_S
        while time.monotonic() < deadline_s:
            if found := look():
                return found[0]
            time.sleep(0.2)
        raise RuntimeError(f"no process {what!r} in the cluster within {COMMAND_S} s")


@contextmanager
def own_cluster(home: Path, cpus: int) -> Iterator[Cluster]:
    """A cluster while this lasts."""
    cluster = Cluster(home)
    try:
        cluster.up(cpus)
        yield cluster
    finally:
        cluster.down()


def _serves(process: psutil.Process, end: str) -> bool:
    """Whether it is a storage process with this title, of a parent that lives."""
    try:
        return title_of(process).endswith(end) and title_of(psutil.Process(process.ppid())).startswith("ray::")
    except psutil.Error:
        return False


def session_of(process: psutil.Process) -> int:
    try:
        return os.getsid(process.pid)
    except OSError:
        return -1


def children_of(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []
