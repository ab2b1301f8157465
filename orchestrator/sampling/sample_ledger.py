"""The sample ledger, which is the positions that every committed step consumed: an audit of its records."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class AuditResult:
    """`problems` is empty exactly when `ok`; `steps` and `positions` count the records. The positions of the steps
    `left_out` were consumed without training on them: their batches had made the loss explode."""

    ok: bool
    problems: tuple[str, ...]
    steps: int
    positions: int
    left_out: tuple[int, ...] = ()


def audit(records: Iterable[tuple[int, int, int]], left_out: Iterable[int] = ()) -> AuditResult:
    """Check that every position from 0 on was consumed exactly once, in order, by consecutive steps from 0.

    Args:
        records: (step, first_position, num_positions) of each committed step, in order of commitment.
        left_out: steps that were reported as left out.
    """
    problems: list[str] = []
    next_step = next_position = num_steps = num_positions = 0
    for step, first, count in records:
        if step < next_step:
            problems.append(f"step {step} was committed again, or late: the step before it was {next_step - 1}")
        elif step > next_step:
            problems.append(f"step {step} was committed where step {next_step} was due")
        if count < 1:
            problems.append(f"step {step} consumed {count} positions; a step consumes at least 1")
        if first < next_position:
            problems.append(f"step {step} began at position {first}: positions up to {next_position} were consumed")
        elif first > next_position:
            problems.append(f"step {step} began at position {first}: positions from {next_position} on were left out")
        next_step, next_position = max(next_step, step + 1), max(next_position, first + count)
        num_steps, num_positions = num_steps + 1, num_positions + count
    return AuditResult(not problems, tuple(problems), num_steps, num_positions, tuple(left_out))
