"""What newcomers are sent of a fence."""

from typing import Any
from unittest.mock import Mock

import pytest

from orchestrator.worker.shard.shard import TrainingProgress
from orchestrator.worker.transition.fence import announce, announced
from tests.unit.policy.imagined import record

STEPS = 1000


class DictStore:
    """Key-value store of one process."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}

    def set(self, key: str, value: str) -> None:
        self._values[key] = value

    def get(self, key: str) -> str:
        return self._values[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self._values for key in keys)


@pytest.mark.parametrize(
    ("journalled", "first"), [(STEPS, STEPS - 1), (STEPS - 1, STEPS - 1), (STEPS - 3, STEPS - 2), (99, 100), (-1, 0)]
)
def test_newcomers_get_the_newest_record_and_all_that_are_not_journalled(journalled: int, first: int) -> None:
    prepared: Any = Mock(store=DictStore())
    prepared.plan.store_prefix = "1/3"
    assert announced(prepared, timeout_s=0.0) is None
    progress = TrainingProgress(STEPS - 1, STEPS, "{}")
    announce(prepared, progress, [record(step) for step in range(STEPS)], journalled)
    fence = announced(prepared, timeout_s=0.0)
    assert fence is not None and fence.progress == progress
    assert [r.step for r in fence.records] == list(range(first, STEPS))
