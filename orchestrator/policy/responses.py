"""How training goes on differently after a failure: smaller micro-batches, batches left out."""

from collections.abc import Sequence
from dataclasses import replace

from orchestrator.policy.limits import RunLimits
from orchestrator.policy.run_state import Loss, Note, Observation, RunState
from orchestrator.sampling.slots import SlotSize


def respond(
    limits: RunLimits, state: RunState, seen: Observation, losses: Sequence[Loss]
) -> tuple[RunState, tuple[Note, ...]]:
    """The state as the next generation is to be planned from it, and what there is to say about that."""
    notes: list[Note] = []
    current = state.current
    size = state.slot or limits.slot
    if any(loss.cause == "out_of_memory" for loss in losses):
        # Several ranks may tell of it one after the other: once is enough for one generation.
        untried = current is None or current.slot == size
        smaller = _smaller(size)
        if untried and smaller != size:
            state = replace(state, slot=smaller, slot_ceiling=size.tokens)
            unit = "rows" if size.rows else "tokens"
            sizes = {f"{end}_{unit}": s.rows or s.tokens for end, s in (("from", size), ("to", smaller))}
            notes.append(Note("micro_batch_reduced", sizes | {"step": seen.step}))
    poisoned = {seen.reports[loss.worker].step + 1 for loss in losses if loss.cause == "numeric"}
    if fresh := poisoned - set(state.skips):
        state = replace(state, skips=tuple(sorted({*state.skips, *fresh})))
        notes += [Note("batch_skipped", {"step": step, "why": state.why}) for step in sorted(fresh)]
    return state, tuple(notes)


def _smaller(size: SlotSize) -> SlotSize:
    """So many rows that slots still fill the global batch, or half as many tokens; the same if it can't be less."""
    if size.rows:
        return replace(size, rows=largest_proper_divisor(size.rows))
    return replace(size, tokens=max(1, size.tokens // 2))


def largest_proper_divisor(number: int) -> int:
    """So that slots still fill the global batch. 1 for 1."""
    return next((number // d for d in range(2, number + 1) if number % d == 0), 1)
