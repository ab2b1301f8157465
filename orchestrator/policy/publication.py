"""Steps that may be journalled, and so published, and steps that are finished but not committed.

A step is committed once two failure domains hold its state, by the members' votes, or a checkpoint that includes it.
Where there is no second domain steps are only finished; `protection.publish` decides whether those are published.
"""

from orchestrator.policy.recovery.holders import newest_held
from orchestrator.policy.state.checkpoint_parts import complete_checkpoints
from orchestrator.policy.state.config import RunLimits
from orchestrator.policy.state.run_state import Observation, RunState
from orchestrator.spec.fault_tolerance import COMMITTED


def publishable(limits: RunLimits, state: RunState, seen: Observation) -> int:
    """The newest step that may be published: by the members' votes, or by a checkpoint with all shards written."""
    if limits.publish == COMMITTED:
        return newest_committed(limits, state, seen)
    return max([seen.committed, *_checkpointed(state, seen)])


def newest_committed(limits: RunLimits, state: RunState, seen: Observation) -> int:
    """The newest step that two failure domains hold or that a checkpoint includes; -1 if there is none."""
    published = seen.progress.watermark if limits.publish == COMMITTED else -1  # was committed when it was published
    return max([published, newest_held(state, seen), *_checkpointed(state, seen)])


def num_uncommitted(limits: RunLimits, state: RunState, seen: Observation) -> int:
    """Number of steps that are finished, but not committed; 0 after the end."""
    over = state.outcome is not None
    return 0 if over else max(0, seen.step - newest_committed(limits, state, seen))


def _checkpointed(state: RunState, seen: Observation) -> tuple[int, ...]:
    """Steps of complete checkpoints, and of those with all shards written."""
    written = (commit.step for commit in complete_checkpoints(state, seen))
    return (state.checkpoint_done, seen.checkpointed[1], *written)
