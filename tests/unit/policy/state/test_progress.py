import pytest

from orchestrator.errors import ProtocolError
from orchestrator.policy.state.progress import (
    RECENT_STEPS,
    Progress,
    absorb,
    stall_s,
    tokens_per_second,
    typical_step_s,
)
from tests.unit.policy.imagined import record


def test_the_watermark_rises_with_the_records() -> None:
    progress = absorb(Progress(), [record(0), record(1, validation_loss=3.5)])
    progress = absorb(progress, [record(1), record(2, applied=False)])
    assert (progress.watermark, progress.first_loss, progress.loss) == (2, 4.0, 3.98)
    assert (progress.first_validation_loss, progress.validation_loss) == (3.5, 3.5)
    assert (progress.tokens, progress.skipped) == (300, 1)


def test_a_gap_is_refused() -> None:
    with pytest.raises(ProtocolError, match=r"steps \[2\] came after step 0"):
        absorb(absorb(Progress(), [record(0)]), [record(2)])


def test_a_long_run_keeps_only_the_newest_records() -> None:
    progress = absorb(Progress(), [record(step) for step in range(RECENT_STEPS + 50)])
    assert len(progress.recent) == RECENT_STEPS
    assert progress.recent[-1].step == progress.watermark


def test_the_stall_is_what_the_first_step_took_beyond_a_step() -> None:
    old = [record(step, 0, vote_time=float(step)) for step in range(4)]
    new = [record(4 + i, 1, vote_time=5.0 + 0.5 * i, step_s=0.5) for i in range(5)]
    assert stall_s(absorb(Progress(), old + new), 1, last_word=False) == pytest.approx(5.0 - 3.0 - 0.5)


def test_the_stall_waits_for_five_steps_unless_there_will_be_no_more() -> None:
    records = [record(0, 0, vote_time=0.0), record(1, 1, vote_time=3.0, step_s=1.0)]
    progress = absorb(Progress(), records)
    assert stall_s(progress, 1, last_word=False) is None
    assert stall_s(progress, 1, last_word=True) == pytest.approx(2.0)
    assert stall_s(progress, 2, last_word=True) is None


def test_paces() -> None:
    assert typical_step_s(Progress()) is None and tokens_per_second(Progress()) is None
    progress = absorb(Progress(), [record(step, vote_time=2.0 * step, step_s=0.5) for step in range(5)])
    assert typical_step_s(progress) == 0.5
    assert tokens_per_second(progress) == pytest.approx(50.0)


def test_metrics_of_the_newest_validation_stay_known() -> None:
    validated = record(0, validation_loss=2.0, validation_metrics={"accuracy": 0.5})
    progress = absorb(Progress(), [validated, *(record(step) for step in range(1, 600))])
    assert len(progress.recent) == 512 and progress.validation_metrics == {"accuracy": 0.5}
    again = absorb(progress, [record(600, validation_loss=1.0, validation_metrics={"accuracy": 0.75})])
    assert again.validation_metrics == {"accuracy": 0.75}
