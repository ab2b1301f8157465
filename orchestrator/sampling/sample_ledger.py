"""The sample ledger: the positions that every committed step consumed, and an audit of such records.

`SampleLedger` grows as steps commit and refuses an entry that doesn't follow the last. `audit` assumes nothing: it
checks records from any source and names every gap, repeat and disorder.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import NamedTuple

from orchestrator.errors import ProtocolError


class StepRange(NamedTuple):
    """A committed step consumed positions [first_position, first_position + num_positions)."""

    step: int
    first_position: int
    num_positions: int


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


@dataclass(frozen=True)
class _Stretch:
    """Consecutive steps with equal numbers of positions: keeps the ledger of a long run short."""

    first_step: int
    num_steps: int
    first_position: int
    positions_per_step: int

    @property
    def end_step(self) -> int:
        return self.first_step + self.num_steps

    @property
    def end_position(self) -> int:
        return self.first_position + self.num_steps * self.positions_per_step


class SampleLedger:
    """Append-only record of the positions that committed steps consumed."""

    def __init__(self) -> None:
        self._stretches: list[_Stretch] = []

    @property
    def next_step(self) -> int:
        return self._stretches[-1].end_step if self._stretches else 0

    @property
    def next_position(self) -> int:
        return self._stretches[-1].end_position if self._stretches else 0

    def append(self, step: int, first_position: int, num_positions: int) -> None:
        """Record a committed step. Raises ProtocolError unless it follows the last one without gap or overlap."""
        if (step, first_position) != (self.next_step, self.next_position) or num_positions < 1:
            raise ProtocolError(
                f"step {step} with {num_positions} positions from {first_position} on doesn't follow the ledger, "
                f"which is due step {self.next_step} at position {self.next_position}",
                remedy="Commit steps once, in order.",
                unchanged="The ledger was not changed.",
            )
        last = self._stretches[-1] if self._stretches else None
        if last is not None and last.positions_per_step == num_positions:
            self._stretches[-1] = _Stretch(last.first_step, last.num_steps + 1, last.first_position, num_positions)
        else:
            self._stretches.append(_Stretch(step, 1, first_position, num_positions))

    def records(self) -> Iterator[StepRange]:
        """Every committed step, in order; input for `audit`."""
        for stretch in self._stretches:
            for n in range(stretch.num_steps):
                first_position = stretch.first_position + n * stretch.positions_per_step
                yield StepRange(stretch.first_step + n, first_position, stretch.positions_per_step)

    def state_dict(self) -> dict[str, list[dict[str, int]]]:
        return {"stretches": [asdict(stretch) for stretch in self._stretches]}

    def load_state_dict(self, state: dict[str, list[dict[str, int]]]) -> None:
        """Restore a `state_dict`. Raises ProtocolError, changing nothing, if it is inconsistent."""
        try:
            stretches = [_Stretch(**stretch) for stretch in state["stretches"]]
            step = position = 0
            for stretch in stretches:
                begins = (stretch.first_step, stretch.first_position)
                if begins != (step, position) or min(stretch.num_steps, stretch.positions_per_step) < 1:
                    raise ValueError(f"{stretch} doesn't begin at step {step} and position {position}, or is empty")
                step, position = stretch.end_step, stretch.end_position
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(
                f"a saved sample ledger doesn't fit: {error!r}",
                remedy="Load the ledger that belongs to this run.",
                unchanged="The ledger was not changed.",
            ) from error
        self._stretches = stretches
