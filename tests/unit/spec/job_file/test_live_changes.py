"""What of a job may change while its run is active."""

import pytest

from orchestrator.errors import UsageError
from orchestrator.spec.job_file.live_changes import priority_of


@pytest.mark.parametrize(("text", "priority"), [("priority=5", 5), ("priority = -3", -3)])
def test_a_priority_is_read(text: str, priority: int) -> None:
    assert priority_of(text) == priority


@pytest.mark.parametrize(
    ("text", "message", "remedy"),
    [
        ("priority", "is no KEY=VALUE", "priority=5"),
        ("priority=high", "must be a whole number", ""),
        ("priority=101", "must be from -100 to 100", ""),
        ("workers=3", "workers can't change in an active run", "scale RUN --workers N"),
        ("curriculum.stages=1", "curriculum.stages can't change", "curriculum set RUN"),
        ("train.lr=1", "train.lr can't change in an active run", "Submit a new run"),
        ("schema=v2", "schema can't change", "What can change is priority"),
        ("priorty=3", "priorty is no key of a job", "Did you mean `priority`"),
    ],
)
def test_anything_else_is_refused_by_name(text: str, message: str, remedy: str) -> None:
    with pytest.raises(UsageError) as refused:
        priority_of(text)
    assert message in refused.value.message and remedy in refused.value.remedy
    assert refused.value.unchanged == "Nothing was changed."
