"""One fault in a live run, and what came of it, from the survivors' own record of their votes."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.support.product import LiveRun
from orchestrator.policy.state.progress import STALL_STEPS
from orchestrator.protocol.status import Recovery, RunStatus
from orchestrator.protocol.step_record import StepRecord
from orchestrator.storage.backends.location import objects_at
from orchestrator.storage.journal import read_events

STEADY_STEPS = 6  # in the full world, before a fault
MOMENT_S = 60.0  # how long the moment of a fault is waited for


@dataclass(frozen=True)
class Fault:
    """One fault and what came of it. `stall_s` is 0 where nothing stopped, `detect_s` None where nothing had to be."""

    stall_s: float
    detect_s: float | None
    committed_steps_lost: int
    steps_replayed: int
    state_identical: bool
    step_s: float


def full(live: LiveRun, size: int) -> RunStatus:
    """Wait until the run is whole again and has done some steps so."""
    live.until(lambda s: s.workers_now == size and s.standbys == 0, f"it has {size} workers")
    begun = live.status().step
    return live.until(lambda s: s.step >= begun + STEADY_STEPS and s.workers_now == size, "it goes on steadily")


def after_loss(
    live: LiveRun, victims: Sequence[str], strike: Callable[[], None], at_moment: Callable[[], None]
) -> Fault:
    """Lose these workers, and wait until the run has gone on.

    Args:
        strike: takes the victims away.
        at_moment: returns when that shall be.
    """
    survivor = next(w for w in live.members() if w not in victims)
    known = len(live.status().recoveries)
    at_moment()
    fault_time = time.time()
    strike()
    status = live.until(
        lambda s: len(s.recoveries) > known and s.recoveries[-1].stall_s is not None, "it has recovered"
    )
    return fault_of(live, survivor, fault_time, status.recoveries[known])


def within_a_step(live: LiveRun, share: float) -> Callable[[], None]:
    """Some moment of a step: `share` of its length from now on."""
    pause_s = share * typical_step_s(live, live.members()[0])
    return lambda: time.sleep(pause_s)


def once(condition: Callable[[], bool]) -> Callable[[], None]:
    """The moment at which the condition comes to hold; RuntimeError if it doesn't."""

    def wait() -> None:
        deadline_s = time.monotonic() + MOMENT_S
        while not condition():
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"the moment for a fault did not come within {MOMENT_S:.0f} s")
            time.sleep(0.002)

    return wait


def fault_of(live: LiveRun, survivor: str, fault_time: float, recovery: Recovery) -> Fault:
    votes = live.report_of(survivor, after_step=-1).history.records
    events = read_events(objects_at(live.run_dir))
    published = max(
        (r["step"] for e in events if e["kind"] == "steps" and e["time"] < fault_time for r in e["records"]), default=-1
    )
    aborted = min(e["time"] for e in events if e["kind"] == "generation_aborted" and e["time"] > fault_time)
    return fault_from_votes(votes, fault_time, published, aborted, recovery)


def fault_from_votes(
    votes: Sequence[StepRecord], fault_time: float, published: int, aborted_time: float, recovery: Recovery
) -> Fault:
    """From a survivor's record of its votes; `published` is the newest step that users knew of at the fault."""
    new = [vote for vote in votes if vote.generation == recovery.generation]
    step_s = median(vote.timing.step_s for vote in new[: 2 * STALL_STEPS])
    first = next(vote for vote in new if vote.step > published)
    return Fault(
        stall_s=first.timing.vote_time - fault_time - step_s,
        detect_s=aborted_time - fault_time,
        committed_steps_lost=max(recovery.steps_lost, published + 1 - new[0].step),
        steps_replayed=recovery.steps_replayed,
        state_identical=recovery.state_identical is True,
        step_s=step_s,
    )


def typical_step_s(live: LiveRun, worker: str) -> float:
    return median(vote.timing.step_s for vote in live.report_of(worker, after_step=-1).history.records[-STALL_STEPS:])
