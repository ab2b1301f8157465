"""Errors that the end of a run corresponds to."""

import pickle

import pytest

from orchestrator.errors import NotFinished, OrchestratorError, RunFailed, RunStopped
from orchestrator.protocol.status import RunPhase, raise_unless_succeeded
from tests.unit.cli.statuses import status


@pytest.mark.parametrize(
    ("phase", "error", "exit_code"),
    [
        (RunPhase.FAILED, RunFailed, 100),
        (RunPhase.STOPPED, RunStopped, 103),
        (RunPhase.TRAINING, NotFinished, 101),
    ],
)
def test_ends_that_are_no_success_are_errors(phase: RunPhase, error: type[OrchestratorError], exit_code: int) -> None:
    with pytest.raises(error) as caught:
        raise_unless_succeeded(status(phase=phase, error="rank 1 died" if phase is RunPhase.FAILED else None))
    assert caught.value.exit_code == exit_code


def test_a_failure_carries_the_traceback_of_what_a_worker_raised() -> None:
    with pytest.raises(RunFailed) as caught:
        raise_unless_succeeded(status(phase=RunPhase.FAILED, error="w0 failed", traceback="Traceback: line 3"))
    assert caught.value.traceback == "Traceback: line 3"
    assert pickle.loads(pickle.dumps(caught.value)).traceback == "Traceback: line 3"


def test_success_raises_nothing() -> None:
    raise_unless_succeeded(status(phase=RunPhase.SUCCEEDED))
