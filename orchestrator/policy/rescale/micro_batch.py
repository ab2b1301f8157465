"""Micro-batch sizes fitted to the workers' memory, where the job asks for that.

    fit_micro_batches: a generation trains -> its members report the memory of their micro-batches -> room for more
               -> plan g+1 of the same members with larger micro-batches, until another transition gains nothing

The first micro-batches are one row long. Each generation is a probe: its steps count, and there are no trial steps. A
micro-batch grows at most fourfold at once, since a small one's use may be hidden by memory that the process had anyway.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from orchestrator.policy.rescale.generation_plan import MAX_FAILED_TRANSITIONS, can_plan, planned_transition
from orchestrator.policy.state.config import RunLimits
from orchestrator.policy.state.run_parts import Probe
from orchestrator.policy.state.run_state import Decision, Observation, RunState
from orchestrator.policy.state.world_size import SizeChange
from orchestrator.protocol.events.training import MicroBatchFitted
from orchestrator.protocol.worker_report import MicroBatchMemory
from orchestrator.sampling.micro_batches import split_into_micro_batches

PROBE_STEPS = 3  # of a generation, or of a row length within it, before its memory use is known
TARGET = 0.9  # of a worker's memory; Ray kills workers above 0.95 of a node's
HIGH = 0.95  # of a worker's memory; above it micro-batches shrink
GROWTH = 4.0  # at most, in one transition
KEPT_FACTOR = 1.5  # peak of a pass over the activations that its forward part keeps, at most
SEEN_FACTOR = 1.1  # margin on the measured bytes per token, which may be a little low for later ones
WORTH_IT = 1.1  # of the present size: less isn't worth a transition
SMALLER = 0.8  # of the present size


@dataclass(frozen=True)
class MemoryShare:
    """Bytes of its host's or its GPU's memory that a worker may take, and bytes that it has taken."""

    bytes: int
    taken: int

    @property
    def fraction(self) -> float:
        return self.taken / max(self.bytes, 1)


def fit_micro_batches(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """Grow micro-batches to what fits, or shrink them before memory runs out. A rule of `lifecycle`."""
    if not limits.fits_memory or state.current is None or not can_plan(state, seen):
        return Decision(state)
    reported = {w: seen.reports[w].micro_batches for w in state.members}
    memory = {w: use for w, use in reported.items() if use is not None and use.generation == state.current.generation}
    if len(memory) < len(state.members) or min(use.steps for use in memory.values()) < PROBE_STEPS:
        return Decision(state)
    if state.failures.transitions >= MAX_FAILED_TRANSITIONS:
        return Decision(state)
    shares = shares_of(memory, limits.memory_bytes)
    now = max(
        state.current.micro_batch.tokens, *(use.tokens for use in memory.values())
    )  # a row may be longer than a micro-batch
    ceiling = state.micro_batch.ceiling_tokens if len(state.members) <= state.micro_batch.ceiling_workers else 0
    wanted = next_tokens(now, memory, shares, state.micro_batch.probes, ceiling)
    if not is_worth_it(limits, state, now, wanted, memory):
        return Decision(state)
    probes = tuple(Probe(w, u.sequence_length, u.tokens, u.resident_bytes) for w, u in memory.items())
    fullest = max(shares, key=lambda worker: shares[worker].fraction)
    note = MicroBatchFitted(
        from_tokens=now,
        to_tokens=wanted,
        step=seen.step,
        worker=fullest,
        memory_bytes=shares[fullest].bytes,
        taken_bytes=shares[fullest].taken,
        kept_bytes=memory[fullest].kept_bytes,
    )
    fitted = replace(
        state,
        micro_batch=replace(state.micro_batch, size=replace(state.current.micro_batch, tokens=wanted), probes=probes),
    )
    change = SizeChange(len(state.members), None)
    why = f"micro-batches of {wanted} tokens fit the memory" if wanted > now else "memory is short"
    return planned_transition(limits, fitted, seen, state.members, change, why).then(note)


def shares_of(memory: Mapping[str, MicroBatchMemory], reserved: int | None) -> dict[str, MemoryShare]:
    """The memory that each worker may take: an equal part of what other processes leave of the memory that it shares.

    Args:
        reserved: the job's limit of a host's memory per worker; None if it sets none.
    """
    shares = {}
    for worker, use in memory.items():
        sharing = [other.resident_bytes for other in memory.values() if other.place == use.place]
        others = max(0, use.used_bytes - sum(sharing))
        share = (use.limit_bytes - others) // len(sharing)
        most = share if reserved is None or use.is_gpu else min(share, reserved)
        shares[worker] = MemoryShare(most, use.resident_bytes)
    return shares


def next_tokens(
    now: int,
    memory: Mapping[str, MicroBatchMemory],
    shares: Mapping[str, MemoryShare],
    probes: Sequence[Probe],
    ceiling: int,
) -> int:
    """Tokens of the next micro-batches: what fits the worker with the least room.

    Args:
        now: tokens of the present micro-batches.
        probes: memory that workers had taken at the last change of the micro-batch size.
        ceiling: a size that was too large, so micro-batches stay smaller; 0 for none.
    """
    last = {probe.worker: probe for probe in probes}
    if any(shares[w].fraction > HIGH and _has_grown(use, last.get(w)) for w, use in memory.items()):
        return min(now, max(_row_length(memory), int(now * SMALLER)))
    before = {worker: probe for worker, probe in last.items() if probe.sequence_length == _row_length(memory)}
    fits = min(_fitting(use, shares[w], before.get(w)) for w, use in memory.items())
    grown = int(min(fits, GROWTH * now))
    return max(now, grown if not ceiling else min(grown, int(ceiling * SMALLER)))


def is_worth_it(
    limits: RunLimits, state: RunState, now: int, wanted: int, memory: Mapping[str, MicroBatchMemory]
) -> bool:
    """Whether another size changes enough: always if smaller; a larger one must reduce the number of micro-batches of a
    step, of which each worker needs one."""
    assert state.current is not None
    if wanted < now:
        return True
    if wanted < WORTH_IT * now or max(use.num_micro_batches for use in memory.values()) <= len(state.members):
        return False
    if limits.by_document:
        return True
    lengths_R = np.full(limits.global_batch_size, _row_length(memory))
    sizes = (state.current.micro_batch, replace(state.current.micro_batch, tokens=wanted))
    present, larger = (len(split_into_micro_batches(lengths_R, size)) for size in sizes)
    return larger < present


def _fitting(use: MicroBatchMemory, share: MemoryShare, before: Probe | None) -> float:
    """Tokens of a micro-batch with which a worker takes `TARGET` of its share."""
    kept = use.kept_bytes / max(use.tokens, 1)
    per_token = KEPT_FACTOR * kept
    if before is not None and use.tokens > before.tokens:
        seen = (use.resident_bytes - before.resident_bytes) / (use.tokens - before.tokens)
        if seen >= kept:  # a smaller figure can't be: part of it was memory that the process had anyway
            per_token = SEEN_FACTOR * seen
    room = TARGET * share.bytes - share.taken
    if per_token <= 0:  # unknown: grow carefully
        return 2.0 * use.tokens if room > 0 else 0.0
    return use.tokens + room / per_token


def _has_grown(use: MicroBatchMemory, before: Probe | None) -> bool:
    """Whether its memory still grows. Processes keep freed memory, so smaller micro-batches help only then."""
    return before is not None and use.resident_bytes > 1.01 * before.resident_bytes


def _row_length(memory: Mapping[str, MicroBatchMemory]) -> int:
    """Tokens of the (longest) row, the same on all members as they are in the same step."""
    return next(iter(memory.values())).sequence_length
