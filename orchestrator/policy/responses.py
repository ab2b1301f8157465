"""How training goes on differently after a failure: smaller micro-batches, batches left out."""

from collections.abc import Sequence
from dataclasses import replace

from orchestrator.policy.limits import RunLimits
from orchestrator.policy.run_state import Loss, Note, Observation, RunState


def respond(
    limits: RunLimits, state: RunState, seen: Observation, losses: Sequence[Loss]
) -> tuple[RunState, tuple[Note, ...]]:
    """The state as the next generation is to be planned from it, and what there is to say about that."""
    notes: list[Note] = []
    current = state.current
    size = micro_batch_of(limits, state.micro_batch)
    if any(loss.cause == "out_of_memory" for loss in losses):
        # Several ranks may tell of it one after the other: once is enough for one generation.
        untried = current is None or micro_batch_of(limits, current.micro_batch) == size
        if untried and size > 1:
            smaller = largest_proper_divisor(size)
            state = replace(state, micro_batch=smaller)
            notes.append(Note("micro_batch_reduced", {"from_rows": size, "to_rows": smaller, "step": seen.step}))
    poisoned = {seen.reports[loss.worker].step + 1 for loss in losses if loss.cause == "numeric"}
    if fresh := poisoned - set(state.skips):
        state = replace(state, skips=tuple(sorted({*state.skips, *fresh})))
        notes += [Note("batch_skipped", {"step": step, "why": state.why}) for step in sorted(fresh)]
    return state, tuple(notes)


def micro_batch_of(limits: RunLimits, micro_batch: int) -> int:
    """Rows of a slot; 0 stands for the job's."""
    return micro_batch or limits.micro_batch_size


def largest_proper_divisor(number: int) -> int:
    """So that slots still fill the global batch. 1 for 1."""
    return next((number // d for d in range(2, number + 1) if number % d == 0), 1)
