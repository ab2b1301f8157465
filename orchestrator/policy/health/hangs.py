"""Detection of unresponsive workers whose processes may still be alive.

A frozen process, a lost host and a broken link look alike: the control thread doesn't answer, whatever the training
thread is doing. If all answer and no step is finished, one member hangs outside of a collective while the others wait
in the next one: the member that has entered the fewest collectives. One that waits for storage to give it the rows of
its step, or to take records, reports that, and doesn't hang: another one in its place would wait too.
"""

from orchestrator.policy.state.progress import typical_step_s
from orchestrator.policy.state.run_state import Observation, RunState
from orchestrator.protocol.worker_phase import Phase

SILENT_S = 2.25  # without an answer from a warm worker
SILENT_WHEN_STOPPING_S = 1.0  # likewise, after its peers complained and it should have stopped
STUCK_S = 30.0  # least time without a step before a member counts as hung; more for long steps
STUCK_STEPS = 10.0
UNKNOWN_STEP_S = 12.0  # assumed step time before the first step


def is_silent(seen: Observation, worker: str, limit_s: float = SILENT_S) -> bool:
    """Whether a worker has not answered for `limit_s`. Workers that still import torch may be silent for longer."""
    return seen.phase(worker) not in (Phase.COLD, Phase.WARMING) and seen.silence_s.get(worker, 0.0) >= limit_s


def find_hung_member(state: RunState, seen: Observation) -> str | None:
    """The member that the others wait for; None if they don't wait, or if it can't be identified."""
    members = [report for w in state.members if (report := seen.reports.get(w)) is not None]
    if len(members) < max(2, len(state.members)) or any(r.phase is not Phase.TRAINING for r in members):
        return None
    if any(report.unread is not None for report in members):
        return None
    patience_s = max(STUCK_S, STUCK_STEPS * (typical_step_s(seen.progress) or UNKNOWN_STEP_S))
    if seen.idle_s < patience_s:
        return None
    fewest = min(report.process.collective for report in members)
    behind = [report.worker for report in members if report.process.collective == fewest]
    return behind[0] if len(behind) == 1 else None
