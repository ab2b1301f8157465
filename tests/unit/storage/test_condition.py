import errno
import os

import pytest

from orchestrator.storage.condition import AWAY_AFTER_S, StorageCondition, refusal, unanswered


@pytest.mark.parametrize(
    ("number", "condition"),
    [
        (errno.ENOSPC, StorageCondition.FULL),
        (errno.EDQUOT, StorageCondition.FULL),
        (errno.EROFS, StorageCondition.READ_ONLY),
        (errno.EACCES, StorageCondition.READ_ONLY),
        (errno.EBUSY, StorageCondition.SLOW),
        (errno.EIO, StorageCondition.AWAY),
        (errno.ESTALE, StorageCondition.AWAY),
    ],
)
def test_an_error_shows_the_condition_of_storage(number: int, condition: StorageCondition) -> None:
    trouble = refusal("it can't be written", OSError(number, os.strerror(number), "/runs"))
    assert (trouble.condition, trouble.why) == (condition, f"it can't be written: {os.strerror(number)}")


def test_an_error_without_a_number_is_storage_that_is_away() -> None:
    assert refusal("x", OSError("the process has ended")).condition is StorageCondition.AWAY


def test_storage_that_does_not_answer_is_slow_and_then_away() -> None:
    assert unanswered(6.0, 5.0).condition is unanswered(4.0 + AWAY_AFTER_S, 5.0).condition is StorageCondition.SLOW
    assert unanswered(5.0 + AWAY_AFTER_S, 5.0).condition is StorageCondition.AWAY
    assert unanswered(140.0, 120.0).condition is StorageCondition.SLOW  # a call that may be lengthy
    assert unanswered(75.0, 5.0).why == "run storage has not answered for 75 s"
