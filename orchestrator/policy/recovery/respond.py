"""Changes to training in response to a failure: smaller micro-batches, skipped batches."""

from collections.abc import Sequence
from dataclasses import replace

from orchestrator.policy.state.config import RunLimits
from orchestrator.policy.state.run_parts import WorkerFailure
from orchestrator.policy.state.run_state import Observation, RunState
from orchestrator.protocol.events.base import Event
from orchestrator.protocol.events.training import BatchSkipped, MicroBatchReduced
from orchestrator.sampling.micro_batches import MicroBatchSize

SUSPECT_STEPS = 8  # of a generation with larger micro-batches


def respond(
    limits: RunLimits, state: RunState, seen: Observation, failures: Sequence[WorkerFailure]
) -> tuple[RunState, tuple[Event, ...]]:
    """The state from which to plan the next generation, and the events of its changes."""
    notes: list[Event] = []
    current = state.current
    last = current or state.previous
    size = last.micro_batch if last is not None and last.micro_batch else limits.micro_batch
    if any(failure.cause == "out_of_memory" or _died_of_growth(limits, state, seen, failure) for failure in failures):
        # Several ranks may report it one after the other: shrink once per generation.
        smaller = _smaller(size)
        planned = state.micro_batch.size
        untried = not planned or (planned.rows, planned.tokens) > (smaller.rows, smaller.tokens)
        if untried and smaller != size:
            world_size = last.world.size if last is not None else limits.initial_workers
            fitted = replace(state.micro_batch, size=smaller, ceiling_tokens=size.tokens, ceiling_workers=world_size)
            state = replace(state, micro_batch=fitted)
            reduced = MicroBatchReduced(seen.step)
            if size.rows:
                reduced = replace(reduced, from_rows=size.rows, to_rows=smaller.rows)
            else:
                reduced = replace(reduced, from_tokens=size.tokens, to_tokens=smaller.tokens)
            notes.append(reduced)
    poisoned = {seen.reports[failure.worker].step + 1 for failure in failures if failure.cause == "numeric"}
    if fresh := poisoned - set(state.failures.skips):
        state = replace(state, failures=replace(state.failures, skips=tuple(sorted({*state.failures.skips, *fresh}))))
        notes += [BatchSkipped(step, state.why) for step in sorted(fresh)]
    return state, tuple(notes)


def _died_of_growth(limits: RunLimits, state: RunState, seen: Observation, failure: WorkerFailure) -> bool:
    """Whether a process ended suddenly in the first steps of larger micro-batches: most likely the kernel killed it for
    want of memory, for which it gives no reason."""
    if not limits.fits_memory or failure.cause != "worker" or state.current is None:
        return False
    known = [use for w in state.members if (use := seen.report(w).micro_batches)]
    steps = [use.steps for use in known if use.generation == state.current.generation]
    smallest = min((probe.tokens for probe in state.micro_batch.probes), default=state.current.micro_batch.tokens)
    return smallest < state.current.micro_batch.tokens and max(steps, default=SUSPECT_STEPS) < SUSPECT_STEPS


def _smaller(size: MicroBatchSize) -> MicroBatchSize:
    """Fewer rows, so that micro-batches still fill the global batch, or half as many tokens; unchanged at the least."""
    if size.rows:
        return replace(size, rows=largest_proper_divisor(size.rows))
    return replace(size, tokens=max(1, size.tokens // 2))


def largest_proper_divisor(number: int) -> int:
    """The largest divisor below `number`, so that micro-batches still fill the global batch. 1 for 1."""
    return next((number // d for d in range(2, number + 1) if number % d == 0), 1)
