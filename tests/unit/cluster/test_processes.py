"""Real processes of our own: a shell that leads a session, with children."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import psutil
import pytest

from orchestrator.cluster.processes import Process, describe, end_session, is_running, living_of

# The leader starts a child in a process group of its own, an orphan whose parent has ended, and says when all is up.
SCRIPT = "set -m; sleep 300 & (sleep 301 & echo $!) ; echo $!; sleep 302"


@dataclass(frozen=True)
class Session:
    leader: Process
    others: frozenset[int]  # pids of two members


@pytest.fixture
def session() -> Iterator[Session]:
    process = subprocess.Popen(["bash", "-c", SCRIPT], start_new_session=True, stdout=subprocess.PIPE, text=True)
    leader = describe(psutil.Process(process.pid))
    assert process.stdout is not None
    yield Session(leader, frozenset(int(process.stdout.readline()) for _ in range(2)))
    for member in living_of(leader, ()):
        member.kill()
    process.stdout.close()


def test_a_session_ends_with_children_and_orphans(session: Session) -> None:
    assert is_running(session.leader)
    assert session.others <= {process.pid for process in living_of(session.leader, [session.leader])}
    assert end_session(session.leader, [session.leader]) == ()
    assert not is_running(session.leader) and not any(map(runs, session.others))


def test_orphans_are_found_when_the_leader_is_gone(session: Session) -> None:
    leader = psutil.Process(session.leader.pid)
    leader.kill()
    psutil.wait_procs([leader], timeout=60)
    assert all(map(runs, session.others))
    assert end_session(session.leader, [session.leader]) == ()
    assert not any(map(runs, session.others))


def test_a_stranger_with_a_reused_pid_is_left_alone(session: Session) -> None:
    earlier = replace(session.leader, started=f"{session.leader.started}0")
    assert not is_running(earlier)
    assert end_session(earlier, [earlier]) == ()
    assert is_running(session.leader) and all(map(runs, session.others))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the kernel keeps the time of the start itself")
def test_a_process_is_the_same_after_the_clock_was_set(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    process = psutil.Process(session.leader.pid)
    before = process.create_time()
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: 1e6)  # /proc/stat has the clock's time of the boot
    assert abs(psutil.Process(process.pid).create_time() - before) > 60
    assert is_running(session.leader)
    assert end_session(session.leader, [session.leader]) == ()
    assert not any(map(runs, session.others))


def runs(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
