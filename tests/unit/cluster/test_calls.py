import pytest
from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayTaskError

from orchestrator.cluster.calls import cause_of, reason_of
from orchestrator.errors import DataError


def test_the_reason_is_what_the_callee_raised() -> None:
    ours = RayTaskError("f", "traceback", DataError("no text", remedy="Add some"))
    assert reason_of(ours) == "no text. Add some."
    assert reason_of(RayTaskError("f", "traceback", KeyError("x"))) == "KeyError: 'x'"


def test_the_reason_of_a_death_is_one_line_without_ids() -> None:
    text = "The actor died.\n\tclass_name: Host\n\tpid: 12\nIts process ended. Some common causes include: (1) much"
    assert reason_of(RuntimeError(text)) == "The actor died. Its process ended."


def test_a_killed_process_is_told_in_words() -> None:
    text = (
        "The actor died unexpectedly.\n\tpid: 12\nThe actor is dead because its worker process has died. Worker exit "
        "type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits with a connection error code 2. End of file."
    )
    assert reason_of(RuntimeError(text)).startswith("its process ended suddenly: killed from outside")


def test_a_worker_lost_with_its_host_is_told_in_our_words() -> None:
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
