"""The hosts that other tests here run on: they are apart, they are joined, and nothing of them is left."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress

import psutil
import pytest

from tests.support.hosts import Hosts, until

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(300),
    pytest.mark.skipif(Hosts.available() is not None, reason=str(Hosts.available())),
]

PORT = 5000
CALL = f"import socket, sys; print(socket.create_connection((sys.argv[1], {PORT}), 1.0).recv(100).decode())"
ANSWER = f"""
import socket
server = socket.create_server(("", {PORT}))
print("listens", flush=True)
while True:
    connection, (caller, _) = server.accept()
    connection.sendall(caller.encode())
    connection.close()
"""
TAKE = f"""
import socket, time
server = socket.create_server(("", {PORT}))
print("listens", flush=True)
connection, _ = server.accept()
count, began_s = 0, time.monotonic()
while data := connection.recv(1 << 20):
    count += len(data)
print(count * 8 / 1e6 / (time.monotonic() - began_s))
"""
SEND = f"""
import socket, sys
with socket.create_connection((sys.argv[1], {PORT}), 1.0) as connection:
    connection.sendall(bytes(int(sys.argv[2])))
"""


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with Hosts(2) as hosts:
        yield hosts


def _listen(hosts: Hosts, index: int, script: str) -> "subprocess.Popen[str]":
    process = hosts.popen(index, [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "listens\n"
    return process


def _call(hosts: Hosts, index: int, callee: int) -> str:
    return hosts.run(index, [sys.executable, "-c", CALL, hosts.addresses[callee]]).strip()


def test_hosts_reach_each_other_unless_one_is_cut(hosts: Hosts) -> None:
    _listen(hosts, 0, ANSWER)
    assert _call(hosts, 1, 0) == hosts.addresses[1]  # no address is translated on the way
    hosts.cut(1)
    with pytest.raises(AssertionError, match="timed out|No route to host"):
        _call(hosts, 1, 0)
    hosts.mend(1)
    assert _call(hosts, 1, 0) == hosts.addresses[1]


def test_another_host_replaces_a_killed_one() -> None:
    with Hosts(2) as hosts:
        _listen(hosts, 0, ANSWER)
        hosts.kill_host(1)
        index = hosts.add()
        assert index == 2 and _call(hosts, index, 0) == hosts.addresses[index]
        (init,) = hosts.processes(index)
    assert not init.is_running()


def test_a_host_sees_its_own_processes_only(hosts: Hosts) -> None:
    sleeper = hosts.popen(0, ["sleep", "60"])
    until(lambda: "sleep" in [p.name() for p in hosts.processes(0)], 5.0, "the process's start")
    seen = [hosts.run(index, ["sh", "-c", "cat /proc/[0-9]*/comm"]).split() for index in (0, 1)]
    assert "sleep" in seen[0] and "sleep" not in seen[1] and "pytest" not in seen[0]
    sleeper.kill()
    sleeper.wait()
    until(lambda: len(hosts.processes(0)) == 1, 5.0, "the process's end")


def _speed_mbit(hosts: Hosts, num_bytes: int) -> float:
    taker = _listen(hosts, 0, TAKE)
    hosts.run(1, [sys.executable, "-c", SEND, hosts.addresses[0], str(num_bytes)], timeout_s=30.0)
    return float(taker.communicate(timeout=30.0)[0])


@pytest.mark.parametrize("limited", [0, 1], ids=["to the host", "from the host"])
def test_a_limited_link_is_as_slow_as_that(hosts: Hosts, limited: int) -> None:
    assert _speed_mbit(hosts, 50_000_000) > 500.0
    hosts.limit(limited, 50)
    slow = _speed_mbit(hosts, 5_000_000)
    print(f"a link of 50 Mbit/s carried {slow:.1f}")
    assert 30.0 < slow < 55.0
    hosts.unlimit(limited)
    assert _speed_mbit(hosts, 50_000_000) > 500.0


def test_a_killed_host_takes_its_processes_along_and_no_others(hosts: Hosts) -> None:
    victims = [hosts.popen(1, ["sleep", "60"]) for _ in range(2)]
    survivor = hosts.popen(0, ["sleep", "60"])
    until(lambda: len(hosts.processes(1)) == 3, 5.0, "their start")
    hosts.kill_host(1)
    assert [victim.poll() for victim in victims] == [-signal.SIGKILL] * 2
    assert hosts.processes(1) == [] and survivor.poll() is None


def test_nothing_is_left_of_them_after_any_end() -> None:
    links, mounts = _links(), _mounts()
    with suppress(KeyboardInterrupt), Hosts(2) as hosts:
        hosts.start_ray()
        namespaces = _namespaces(p.pid for i in (0, 1) for p in hosts.processes(i))
        assert len(namespaces) == 2  # of the network, one per host
        ours, directory = psutil.Process().children(recursive=True), hosts.directory
        assert {"raylet", "gcs_server"} <= {p.name() for p in ours}
        assert (_links(), _mounts()) == (links, mounts)
        with pytest.raises(AssertionError, match="ended with 3"):
            hosts.run(1, ["sh", "-c", "exit 3"])
        raise KeyboardInterrupt
    assert not [p for p in ours if p.is_running()]
    assert not namespaces & _namespaces(psutil.pids())
    assert (_links(), _mounts()) == (links, mounts) and not directory.exists()


MAKE_THEM_AND_DIE = """
import os, signal
from tests.support.hosts import Hosts
with Hosts(2) as hosts:
    hosts.popen(0, ["sleep", "600"])
    print(hosts.directory, *[hosts.processes(i)[0].pid for i in (0, 1)], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_no_process_survives_when_the_test_itself_is_killed() -> None:
    links = _links()
    maker = subprocess.run([sys.executable, "-c", MAKE_THEM_AND_DIE], stdout=subprocess.PIPE, text=True, timeout=20.0)
    assert maker.returncode == -signal.SIGKILL
    directory, *inits = maker.stdout.split()
    shutil.rmtree(directory)
    assert len(inits) == 2
    until(lambda: not any(psutil.pid_exists(int(pid)) for pid in inits), 10.0, "the end of what it had started")
    assert _links() == links


def _links() -> list[str]:
    listed = subprocess.run(["ip", "-o", "link"], stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    return [line.split()[1] for line in listed]


def _mounts() -> list[str]:
    with open("/proc/self/mounts") as mounts:
        return mounts.readlines()


def _namespaces(pids: "Iterator[int]") -> set[str]:
    found = set()
    for pid in pids:
        try:
            found.add(os.readlink(f"/proc/{pid}/ns/net"))
        except OSError:  # ended meanwhile, or a thread of the kernel
            continue
    return found


def test_every_node_of_ray_is_seen_by_the_head() -> None:
    with Hosts(3) as hosts:
        began_s = time.monotonic()
        hosts.start_ray(cpus=2)
        print(f"Ray was up on 3 hosts in {time.monotonic() - began_s:.1f} s")
        script = "import ray; ray.init(); [print(n['NodeManagerAddress'], n['Resources']['CPU']) for n in ray.nodes()]"
        for index in (0, 2):  # a driver joins through its own host's node
            said = hosts.run(index, [sys.executable, "-c", script], timeout_s=60.0)
            assert sorted(said.splitlines()) == [f"{address} 2.0" for address in hosts.addresses]
