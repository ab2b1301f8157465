from collections.abc import Callable
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayTaskError

from orchestrator.cluster import calls
from orchestrator.cluster.calls import ONCE, cause_of, once, reason_of
from orchestrator.cluster.remote import Remote
from orchestrator.controller.controller import RunController
from orchestrator.errors import ClusterUnreachable, DataError
from orchestrator.scheduler.scheduler import Scheduler


def test_the_reason_is_what_the_callee_raised() -> None:
    ours = RayTaskError("f", "traceback", DataError("no text", remedy="Add some"))
    assert reason_of(ours) == "no text. Add some."
    assert reason_of(RayTaskError("f", "traceback", KeyError("x"))) == "KeyError: 'x'"


def test_the_reason_of_a_death_is_one_line_without_ids() -> None:
    text = "The actor died.\n\tclass_name: Host\n\tpid: 12\nIts process ended. Some common causes include: (1) much"
    assert reason_of(RuntimeError(text)) == "The actor died. Its process ended."


def test_a_killed_process_is_a_readable_error() -> None:
    text = (
        "The actor died unexpectedly.\n\tpid: 12\nThe actor is dead because its worker process has died. Worker exit "
        "type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits with a connection error code 2. End of file."
    )
    assert reason_of(RuntimeError(text)).startswith("its process ended suddenly: killed from outside")


def test_the_error_of_a_worker_lost_with_its_host_is_readable() -> None:
    error = ActorUnavailableError("RpcError: RPC error: recvmsg:Connection reset by peer rpc_code: 14", b"\x01" * 16)
    assert reason_of(error).startswith("its connections broke")


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (OutOfMemoryError("the worker used too much"), "out_of_memory"),
        (ActorUnavailableError("RpcError", b"\x01" * 16), "network"),
        (RuntimeError("The actor died because its node has died. Node Id: 12"), "node"),
        (RuntimeError("The actor is dead because its worker process has died."), "worker"),
    ],
)
def test_the_class_of_an_end(error: Exception, cause: str) -> None:
    assert cause_of(error) == cause


def test_a_node_that_was_taken_away_with_notice() -> None:
    error = RuntimeError("The actor died because its node has died.")
    error.preempted = True  # type: ignore[attr-defined]
    assert cause_of(error) == "preemption"


class Counted:
    """An actor with methods that may be repeated, and with one that may not. It loses the answer to its first call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        self.read = self.add = SimpleNamespace(remote=self._called)  # as the methods of Ray's handles
        monkeypatch.setattr(calls.ray, "get", lambda answer, timeout: answer())

    def _called(self) -> Callable[[], int]:
        self.calls += 1
        return self._lost if self.calls == 1 else lambda: self.calls

    def _lost(self) -> int:
        raise ActorUnavailableError("RpcError", b"\x01" * 16)


class Methods:
    """The types of `Counted`."""

    def read(self) -> int:
        raise NotImplementedError

    @once
    def add(self) -> int:
        raise NotImplementedError


def test_a_call_is_repeated_when_its_answer_is_lost_unless_it_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    harmless, harmful = Counted(monkeypatch), Counted(monkeypatch)
    assert Remote[Methods](harmless).ask(Methods.read) == 2
    with pytest.raises(ClusterUnreachable, match="the answer to add was lost.*It may have been done"):
        Remote[Methods](harmful).ask(Methods.add)
    assert harmful.calls == 1


def test_a_request_to_kill_one_worker_kills_no_second_one() -> None:
    assert hasattr(Scheduler.kill_worker, ONCE) and hasattr(RunController.kill_worker, ONCE)
