"""Hooks of the steps of a generation."""

from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.protocol.messages import Directive
from orchestrator.storage.condition import StorageCondition, StorageTrouble
from orchestrator.worker.runtime.errors import AbortedGeneration
from orchestrator.worker.runtime.mailbox import WorkerMailbox
from orchestrator.worker.training_loop import TrainingHooks

AWAY = StorageTrouble(StorageCondition.AWAY, "the rows of step 3 can't be read: no connection")


def test_a_wait_for_rows_is_reported_and_ends_with_the_generation() -> None:
    mailbox, nothing = WorkerMailbox("w0", 1), SimpleNamespace()
    parts: list[Any] = [nothing] * 5
    hooks = TrainingHooks(SimpleNamespace(generation=4), mailbox, *parts)  # type: ignore[arg-type]
    mailbox.put(Directive(term=1, seq=1, aborted=3))
    hooks.wait_for_rows(AWAY)
    version = mailbox.state.version
    assert mailbox.state.unread == AWAY
    hooks.wait_for_rows(AWAY)
    assert mailbox.state.version == version  # else its controller would see progress
    hooks.wait_for_rows(None)
    assert mailbox.state.unread is None
    hooks.wait_for_rows(AWAY)
    mailbox.put(Directive(term=1, seq=2, aborted=4))
    with pytest.raises(AbortedGeneration, match="generation 4 was aborted"):
        hooks.wait_for_rows(AWAY)
    assert mailbox.state.unread is None
