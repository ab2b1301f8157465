"""Loss spikes: steps that must be undone. Pure, and the same on every member: all know the same records."""

import math
from collections.abc import Sequence
from itertools import takewhile
from statistics import median

from orchestrator.protocol.step_record import StepRecord

USUAL_STEPS = 32  # before a step, from which the usual loss is taken
FEWEST_STEPS = 8  # of them, needed to judge
LEAST_RISE = 1.0  # nats above the usual loss: less is no spike, however small the loss was
MAX_NOT_FINITE = 8  # updates in a row


def explosion(before: Sequence[StepRecord], record: StepRecord, factor: float | None) -> str:
    """Why the step must be undone and left out; empty if it counts.

    Args:
        before: records of the steps before, oldest first.
        factor: multiple of the usual loss above which a loss is a spike; None: losses are not judged.
    """
    if record.update.skipped:
        return ""
    if not record.update.applied:  # state is unchanged, but this can't go on forever
        row = 1 + sum(1 for _ in takewhile(lambda r: not r.update.applied and not r.update.skipped, reversed(before)))
        return f"the updates of {row} steps in a row were not finite" if row >= MAX_NOT_FINITE else ""
    if factor is None:
        return ""
    if not math.isfinite(record.loss):
        return f"the loss of step {record.step} is {record.loss}"
    usual = [r.loss for r in before[-USUAL_STEPS:] if r.update.applied]
    if len(usual) < FEWEST_STEPS:
        return ""
    middle = median(usual)
    if record.loss <= max(factor * middle, middle + LEAST_RISE):
        return ""
    return f"the loss of step {record.step} is {record.loss:.3f}; the median of the {len(usual)} before is {middle:.3f}"
