"""Who is to be given up, though nothing says that its process has ended.

One path for a frozen process, a lost host and a cut link: its control thread doesn't answer, whatever its training
thread is doing. If all answer and no step gets done, somebody hangs outside of a collective while the others wait in
the next one: whoever has entered the fewest.
"""

from orchestrator.policy.state.progress import typical_step_s
from orchestrator.policy.state.run_state import Observation, RunState
from orchestrator.protocol.messages import Phase

SILENT_S = 2.25  # without the answer that a warm worker owes
SILENT_WHEN_STOPPING_S = 1.0  # likewise, when its peers have complained and it should have stopped
STUCK_S = 30.0  # the least time without a step; longer steps are given more
STUCK_STEPS = 10.0
UNKNOWN_STEP_S = 12.0  # what a step is taken to last before any was done


def is_silent(seen: Observation, worker: str, limit_s: float = SILENT_S) -> bool:
    """Whether it has not answered for so long. Whoever imports torch may be silent for longer."""
    return seen.phase(worker) not in (Phase.COLD, Phase.WARMING) and seen.silence_s.get(worker, 0.0) >= limit_s


def find_hung_member(state: RunState, seen: Observation) -> str | None:
    """The member that keeps the others waiting; None if they aren't, or if it can't be told who it is."""
    members = [report for w in state.members if (report := seen.reports.get(w)) is not None]
    if len(members) < max(2, len(state.members)) or any(r.phase is not Phase.TRAINING for r in members):
        return None
    patience_s = max(STUCK_S, STUCK_STEPS * (typical_step_s(seen.progress) or UNKNOWN_STEP_S))
    if seen.idle_s < patience_s:
        return None
    fewest = min(report.collective for report in members)
    behind = [report.worker for report in members if report.collective == fewest]
    return behind[0] if len(behind) == 1 else None
