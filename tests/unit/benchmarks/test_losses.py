"""What a fault has cost, taken from a survivor's votes."""

import pytest

from benchmarks.support.losses import fault_from_votes
from orchestrator.protocol.status import Recovery
from orchestrator.protocol.step_record import BatchRecord, StepRecord, StepTiming, UpdateRecord

FAULT_TIME = 100.0


def vote(step: int, generation: int, vote_time: float) -> StepRecord:
    return StepRecord(
        step=step,
        generation=generation,
        world_size=4 - generation,
        loss=1.0,
        batch=BatchRecord(tokens=8, first_position=0, num_positions=1),
        update=UpdateRecord(lr=1e-3, grad_norm=1.0, applied=True),
        timing=StepTiming(0.5, vote_time),
    )


@pytest.mark.parametrize(
    ("first_step", "stall_s", "lost"),
    [
        pytest.param(10, 1.0, 0, id="nothing was published beyond the cut"),
        pytest.param(8, 2.0, 2, id="two published steps are done again"),
    ],
)
def test_the_clock_runs_to_the_first_step_that_was_never_published(first_step: int, stall_s: float, lost: int) -> None:
    before = [vote(step, 0, FAULT_TIME - 0.5 * (10 - step)) for step in range(10)]  # 9 is the newest, and published
    after = [vote(first_step + n, 1, FAULT_TIME + 1.5 + 0.5 * n) for n in range(5)]
    recovery = Recovery(1, ("w3",), "node", 4, 3, first_step - 1, "", state_identical=True)
    fault = fault_from_votes([*before, *after], FAULT_TIME, 9, FAULT_TIME + 0.2, recovery)
    assert fault.stall_s == pytest.approx(stall_s) and fault.detect_s == pytest.approx(0.2)
    assert fault.committed_steps_lost == lost and fault.state_identical
