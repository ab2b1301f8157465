"""A run that goes on from a checkpoint, after it has ended, has lost its cluster, or has given its places away."""

from dataclasses import replace

from orchestrator.policy.state.config import RunLimits
from orchestrator.policy.state.run_state import Decision, Note, RunState
from orchestrator.policy.state.world_size import Wish, wanted_size
from orchestrator.protocol.messages import Finish, Restore, ResumeOrder


def resumed(limits: RunLimits, state: RunState, order: ResumeOrder) -> Decision:
    """The state to begin again from. Nobody of the old crew is counted on; numbers that name things go on growing.
    Stages that were decided are decided still, at the same steps."""
    done = order.restore.step if order.restore else -1
    wish = state.wish if order.workers is None else Wish(order.workers, done + 1, by_hand=True)
    workers = wanted_size(limits, wish, done + 1)
    fields = {
        "token": order.token,
        "step": done,
        "checkpoint": order.restore.path if order.restore else None,
        "workers": workers,
        "residuals": "left behind" if order.restore and order.restore.reset_residuals else None,
    }
    target = replace(
        state.target,
        seq=state.target.seq + 1,
        workers=workers,
        finish=Finish.NO,
        reason="resumed",
        stage_wishes=state.stage_wishes,
    )
    begun = replace(begun_again(state, order.restore), target=target, wish=wish)
    return Decision(begun, (Note("resumed", fields),))


def begun_again(state: RunState, restore: Restore | None) -> RunState:
    """The state with nobody in the crew and no generation, to begin from this checkpoint; None: from the seed."""
    done = restore.step if restore else -1
    return RunState(
        target=state.target,
        seq=state.seq + 1,
        wish=state.wish,
        grant=state.grant,
        granted_since=state.granted_since,
        queued_s=state.queued_s,
        num_spawned=state.num_spawned,
        num_generations=state.num_generations,
        activated=state.activated,
        checkpoint_done=done,
        rescales=tuple(r for r in state.rescales if r.step < done),
        restore=restore,
        differences=state.differences_in(done),
        stages=state.stages,
        stages_version=state.stages_version + bool(state.stages),
        stage_wishes=state.stage_wishes,
    )
