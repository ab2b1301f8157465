"""Several hosts on one machine: each has its own network and its own processes, and shares the file system.

with Hosts(3) as hosts:
    address = hosts.start_ray(cpus=1)                   # host 0 is the head; all nodes are alive when this returns
    hosts.run(0, [sys.executable, "-c", "..."])         # connects to that cluster without being told where it is
    hosts.cut(2)                                        # what it sends, and what is sent to it, is lost
    hosts.kill_host(1)

A host is a pair of namespaces of the kernel, network and pid, that live as long as the first process in them, its
init, which is ours. They have no names anywhere: when an init dies, the kernel kills whatever runs on its host and
takes the network away, so nothing but files can stay, even if the test's own process is killed. A further host of that
kind holds the bridge that joins the others, so nothing shows up in the machine's own network, and the addresses can't
collide with any of its networks. Hosts can't reach the machine's network, and the test reaches them by `run` only.
"""

import functools
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import psutil

from orchestrator.cluster.jobs_api import PYTHON

ROOT = Path(__file__).parents[2]
TOOLS = ("ip", "tc", "env", "mount", "nsenter", "setpriv", "unshare")
TEMP_ROOT = Path("/tmp")  # Ray's socket paths must stay below 108 bytes, whatever TMPDIR says
HEAD_PORT = 6379
STARTED = "Ray runtime started"
OBJECT_STORE_BYTES = 80_000_000  # close to the least that Ray takes
START_TIMEOUT_S = 120.0  # starting Ray takes 2 s a host on an idle machine of 2 cores
COMMAND_TIMEOUT_S = 60.0
GONE_TIMEOUT_S = 60.0

# With SIGCHLD ignored the kernel reaps orphans, all of which become children of an init.
INIT = """
import signal
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print("up", flush=True)
while True:
    signal.pause()
"""

COUNT_NODES = """
import sys, time
from ray._raylet import GcsClient
gcs = GcsClient(address=sys.argv[1])
while sum(node.state == 0 for node in gcs.get_all_node_info().values()) < int(sys.argv[2]):
    time.sleep(0.05)
"""

FIND_NODE = """
import sys
from ray._raylet import GcsClient
nodes = GcsClient(address=sys.argv[1]).get_all_node_info().values()
print(*(node.node_id.hex() for node in nodes if node.state == 0 and node.node_manager_address == sys.argv[2]))
"""


class Namespaces:
    """A network and a pid namespace of their own, and the init that keeps them."""

    def __init__(self) -> None:
        # Killed with this very process, however it ends: setpriv ties unshare to us, and unshare ties the init to it.
        tied = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._keeper = subprocess.Popen(
            [*tied, sys.executable, "-c", INIT],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._keeper.stdout is not None and self._keeper.stderr is not None
        if self._keeper.stdout.readline() != "up\n":
            self._keeper.kill()
            raise OSError(f"no namespaces can be made here: {self._keeper.communicate()[1].strip()}")
        (child,) = psutil.Process(self._keeper.pid).children()
        self.init: int = child.pid
        self._pid_namespace = _pid_namespace(self.init)
        self._started: list[subprocess.Popen[Any]] = []

    def popen(self, command: Sequence[str], **options: Any) -> "subprocess.Popen[Any]":
        """Start a command inside, in the current directory, tied to the object that is returned: its end is theirs."""
        enter = ["nsenter", "--target", str(self.init), "--net", "--pid", "--mount", "--"]
        tied = ["setpriv", "--pdeathsig", "KILL", "env", "--chdir", os.getcwd()]
        process = subprocess.Popen([*enter, *tied, *command], **options)
        self._started.append(process)
        return process

    def run(self, command: Sequence[str], timeout_s: float = COMMAND_TIMEOUT_S, **options: Any) -> str:
        """What the command prints. Raises AssertionError with what it said if it fails or takes too long."""
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = self.popen(command, text=True, **pipes, **options)
        try:
            printed, said = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            printed, said = process.communicate()
            raise AssertionError(f"{command} took more than {timeout_s} s\n{printed}{said}") from None
        finally:
            self._started.remove(process)
        assert process.returncode == 0, f"{command} ended with {process.returncode}\n{printed}{said}"
        return str(printed)

    def plug(self, port: str, other: "Namespaces") -> None:
        """A cable from `port` here to `eth0` there."""
        here = ["nsenter", f"--net=/proc/{self.init}/ns/net"]  # but with our pids: the other's is unknown in here
        peer = ["peer", "name", "eth0", "netns", str(other.init)]
        command = [*here, "ip", "link", "add", port, "type", "veth", *peer]
        subprocess.run(command, check=True, timeout=COMMAND_TIMEOUT_S)

    def processes(self) -> list[psutil.Process]:
        """All that run inside, by their ids outside; the init too."""
        return [p for p in psutil.process_iter() if _pid_namespace(p.pid) == self._pid_namespace]

    def kill(self) -> None:
        """SIGKILL to every process inside, all at once, by the kernel. Returns when they are gone. May be repeated."""
        if self._keeper.poll() is None:
            os.kill(self.init, signal.SIGKILL)
        self._keeper.communicate(timeout=GONE_TIMEOUT_S)  # the kernel lets an init end last
        for process in self._started:
            process.wait(timeout=GONE_TIMEOUT_S)
        self._started.clear()


class Hosts:
    """`count` hosts with one network between them, 10.77.0.1 and up; host 0 is the first.

    Args:
        asks: Ray asks for a token, since hosts reach one another's ports.
    """

    def __init__(self, count: int, asks: bool = True) -> None:
        self._asks = asks
        self.addresses = tuple(f"10.77.0.{i + 1}" for i in range(count))
        self._ends = ExitStack()

    @staticmethod
    @functools.cache
    def available() -> str | None:
        """Why hosts can't be made here; None if they can."""
        missing = [tool for tool in TOOLS if shutil.which(tool) is None]
        if sys.platform != "linux" or missing:
            return f"hosts are namespaces of Linux, made with {', '.join(missing or TOOLS)}, which isn't here"
        if os.geteuid() != 0:
            return "hosts are namespaces of the kernel, which only root may make"
        try:
            with Hosts(1) as hosts:
                hosts.limit(0, 100)
        except (OSError, AssertionError) as error:
            return f"hosts can't be made here: {error}"
        return None

    def __enter__(self) -> Self:
        with ExitStack() as ends:
            self.directory = Path(tempfile.mkdtemp(prefix="orch-", dir=TEMP_ROOT))
            ends.callback(shutil.rmtree, self.directory, ignore_errors=True)
            self._write_token()
            self._switch = made(ends)
            self._hosts = [made(ends) for _ in self.addresses]
            self._switch.run(["ip", "link", "add", "bridge", "type", "bridge"])
            self._switch.run(["ip", "link", "set", "bridge", "up"])
            for index in range(len(self.addresses)):
                self._connect(index)
            self._ends = ends.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._ends.close()

    def add(self) -> int:
        """A further host, on which Ray doesn't run yet: `join` starts it. Returns its index."""
        index = len(self._hosts)
        self.addresses += (f"10.77.0.{index + 1}",)
        self._hosts.append(made(self._ends))
        self._connect(index)
        return index

    # -- what runs on a host -----------------------------------------------------------------------------------

    def popen(self, index: int, command: Sequence[str], **options: Any) -> "subprocess.Popen[Any]":
        """Start a command on a host. Killing what is returned kills it; it ends with its host in any case."""
        return self._hosts[index].popen(command, **{"env": self.environment(), **options})

    def run(self, index: int, command: Sequence[str], timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        """What a command prints on a host. Raises AssertionError if it fails or takes longer than `timeout_s`."""
        return self._hosts[index].run(command, timeout_s, env=self.environment())

    def processes(self, index: int) -> list[psutil.Process]:
        """What runs on a host, by the ids that this process knows; on the host itself they have other ones."""
        return self._hosts[index].processes()

    def kill_host(self, index: int) -> None:
        """SIGKILL every process of a host, for good. Its connections get closed: `cut` it first if they shall not."""
        self._hosts[index].kill()

    # -- its link ----------------------------------------------------------------------------------------------

    def cut(self, index: int) -> None:
        """Take a host off the network: nothing arrives in either direction, and no peer is notified."""
        self._switch.run(["ip", "link", "set", f"port{index}", "down"])

    def mend(self, index: int) -> None:
        self._switch.run(["ip", "link", "set", f"port{index}", "up"])

    def limit(self, index: int, mbit: float, queue_ms: int = 50) -> None:
        """Let no more than `mbit` megabits a second through, to the host and from it.

        Args:
            queue_ms: for which packets may wait; those that would longer are lost.
        """
        shape = ["root", "tbf", "rate", f"{mbit}mbit", "burst", "64kb", "latency", f"{queue_ms}ms"]
        self._switch.run(["tc", "qdisc", "replace", "dev", f"port{index}", *shape])
        self._hosts[index].run(["tc", "qdisc", "replace", "dev", "eth0", *shape])

    def unlimit(self, index: int) -> None:
        self._switch.run(["tc", "qdisc", "del", "dev", f"port{index}", "root"])
        self._hosts[index].run(["tc", "qdisc", "del", "dev", "eth0", "root"])

    # -- Ray ---------------------------------------------------------------------------------------------------

    @property
    def head(self) -> str:
        """HOST:PORT of the cluster that `start_ray` starts."""
        return f"{self.addresses[0]}:{HEAD_PORT}"

    def start_ray(self, cpus: int = 1, jobs_port: int | None = None) -> str:
        """Start Ray on every host, each with `cpus` logical CPUs; host 0 is the head, and serves Ray's Jobs API at
        `jobs_port`. Returns the head's HOST:PORT."""
        self._await_ray(0, self._begin_ray(0, cpus, jobs_port))
        starting = [(index, self._begin_ray(index, cpus)) for index in range(1, len(self.addresses))]
        for index, process in starting:
            self._await_ray(index, process)
        self.run(0, [sys.executable, "-c", COUNT_NODES, self.head, str(len(self.addresses))], START_TIMEOUT_S)
        return self.head

    def join(self, index: int, cpus: int = 1) -> None:
        """Start Ray on one host."""
        self._await_ray(index, self._begin_ray(index, cpus))

    def kill_raylet(self, index: int) -> None:
        """SIGKILL Ray's node manager; the rest of the host goes on."""
        (raylet,) = [process for process in self.processes(index) if process.name() == "raylet"]
        raylet.kill()

    def drain(self, index: int, seconds: float) -> float:
        """Tell Ray that a host will be gone, as a cloud's notice does; nothing happens to it. Returns the deadline, in
        `time.time()` seconds."""
        node = self.run(0, [sys.executable, "-c", FIND_NODE, self.head, self.addresses[index]]).strip()
        options = {
            "address": self.head,
            "node-id": node,
            "reason": "DRAIN_NODE_REASON_PREEMPTION",
            "reason-message": "taken back",
            "deadline-remaining-seconds": str(int(seconds)),
        }
        command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node"]
        self.run(0, [*command, *(f"--{key}={value}" for key, value in options.items())], timeout_s=START_TIMEOUT_S)
        return time.time() + seconds

    def ray_log(self, index: int) -> Path:
        """Output of `ray start` on a host."""
        return self.directory / f"ray-{index}.log"

    def _begin_ray(self, index: int, cpus: int, jobs_port: int | None = None) -> "subprocess.Popen[Any]":
        options = {
            "node-ip-address": self.addresses[index],
            "num-cpus": cpus,
            "object-store-memory": OBJECT_STORE_BYTES,
            "temp-dir": self.directory / str(index),
        }
        if index == 0:
            dashboard = {"include-dashboard": "false"}
            if jobs_port is not None:
                here = self.addresses[0]
                dashboard = {"include-dashboard": "true", "dashboard-host": here, "dashboard-port": str(jobs_port)}
            role, options = ["--head"], {**options, "port": HEAD_PORT, **dashboard}
        else:
            role = [f"--address={self.head}"]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *role]
        with self.ray_log(index).open("wb") as log:
            return self._hosts[index].popen(
                [*command, *(f"--{key}={value}" for key, value in options.items())],
                env=self._auth(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _await_ray(self, index: int, process: "subprocess.Popen[Any]") -> None:
        log = self.ray_log(index)

        def has_started() -> bool:
            said = log.read_text(errors="replace")
            assert process.poll() is None, f"Ray ended on host {index}:\n{said}"
            return STARTED in said

        until(has_started, START_TIMEOUT_S, f"Ray's start on host {index}, {log}")

    # -- making them -------------------------------------------------------------------------------------------

    def _connect(self, index: int) -> None:
        host, port = self._hosts[index], f"port{index}"
        self._switch.plug(port, host)
        self._switch.run(["ip", "link", "set", port, "master", "bridge", "up"])
        host.run(["ip", "link", "set", "lo", "up"])
        host.run(["ip", "address", "add", f"{self.addresses[index]}/24", "dev", "eth0"])
        host.run(["ip", "link", "set", "eth0", "up"])
        # Who asks for this host's address as seen from the internet, as Ray does, needs a route to it.
        host.run(["ip", "route", "add", "default", "dev", "eth0"])
        # Hosts know each other's names: who asks for one must not wait for a name server, which can't be reached.
        host.run(["mount", "--bind", str(self._names()), "/etc/hosts"])

    def _names(self) -> Path:
        """This machine's table of names, and all hosts that may still be added."""
        file = self.directory / "hosts"
        if not file.exists():
            known = [f"10.77.0.{number} host{number - 1}\n" for number in range(1, 255)]
            file.write_text(Path("/etc/hosts").read_text() + "".join(known))
        return file

    @property
    def token(self) -> Path:
        """The file with what Ray asks for."""
        return self.directory / "token"

    def host(self, index: int) -> Namespaces:
        return self._hosts[index]

    def _write_token(self) -> None:
        self.token.touch(mode=0o600)
        self.token.write_text(secrets.token_hex(32))

    def environment(self) -> dict[str, str]:
        """A process with it finds this cluster, and none of the machine's."""
        return {**self._auth(), "RAY_ADDRESS": self.head, "ORCHESTRATOR_HOME": str(self.directory / "home")}

    def _auth(self) -> dict[str, str]:
        if not self._asks:
            return {**without_ray(), "RAY_AUTH_MODE": "disabled"}
        return {**without_ray(), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token)}


def until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Return as soon as the condition holds. AssertionError if it doesn't within `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"waited {timeout_s} s for {what}"
        time.sleep(0.02)


def made(ends: ExitStack) -> Namespaces:
    namespaces = Namespaces()
    ends.callback(namespaces.kill)
    return namespaces


def _pid_namespace(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:  # it has just ended
        return ""


def without_ray() -> dict[str, str]:
    """Our environment, less what would change how Ray starts; everything must import this very package."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    path = [str(ROOT), *(entry for entry in kept.get("PYTHONPATH", "").split(os.pathsep) if entry)]
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(path)),
        "RAY_USAGE_STATS_ENABLED": "0",
        PYTHON: sys.executable,
        "NO_COLOR": "1",
    }
