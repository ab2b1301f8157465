"""Live metrics of a run at one moment: its progress, and the values that its alerts watch."""

from orchestrator.policy.health.expert_load import largest_violation
from orchestrator.policy.recovery.holders import num_holders
from orchestrator.policy.rescale.generation_plan import warm_standbys
from orchestrator.policy.state.config import RunLimits
from orchestrator.policy.state.run_state import Observation
from orchestrator.policy.state.world_size import wanted_size
from orchestrator.protocol.events.generations import Activated, GenerationAborted, Rescaled
from orchestrator.protocol.events.notices import ReplayChecked, StateDiffers
from orchestrator.protocol.events.run import Resumed, Submitted
from orchestrator.protocol.events.training import CheckpointCommitted
from orchestrator.protocol.expert_load import ExpertLoad
from orchestrator.run_records.run_history import RunHistory
from orchestrator.spec.model import ModelSpec

BEGINNINGS = (Submitted, Activated, Resumed)  # events that start a run's clocks


def values_of_run(limits: RunLimits, model: ModelSpec, memory: RunHistory, seen: Observation) -> dict[str, float]:
    """Values by metric name. Times are `time.time()` seconds, that of the run's last start until there is a later one;
    a resume is a new start. Counters cover the whole run, also before a controller's first step: they must
    not seem to fall and rise again.
    """
    state, progress = memory.state, memory.progress
    first = (memory.times.get(kind, 0.0) for kind in BEGINNINGS)
    began_time = max(*first, memory.newest_times.get(Resumed, 0.0))
    newest = progress.recent[-1] if progress.recent else None
    return {
        "train/tokens": progress.tokens,
        "train/skipped": progress.skipped,
        "elastic/generation": state.activated,
        "run/wanted_steps": limits.steps,
        "run/finished_steps": seen.step + 1,
        "run/committed_steps": progress.watermark + 1,
        "run/committed_time": max(began_time, newest.timing.vote_time if newest else 0.0),
        "run/checkpoint_time": max(began_time, memory.newest_times.get(CheckpointCommitted, 0.0)),
        "elastic/workers_wanted": wanted_size(limits, state.size_request, seen.step + 1, state.queue.grant),
        "elastic/standbys": len(warm_standbys(state, seen)),
        "elastic/holders": num_holders(state, seen),
        "elastic/rescales": memory.counts[Rescaled],
        "elastic/recoveries": memory.counts[GenerationAborted],
        "elastic/quarantined_nodes": len(state.failures.quarantine),
        "elastic/draining_nodes": len(state.draining),
        "verify/checks": memory.counts[ReplayChecked],
        "verify/differences": memory.counts[StateDiffers],
        "moe/collapse": collapse(newest.routing.experts, model) if newest else 0.0,
    }


def collapse(load: ExpertLoad, model: ModelSpec) -> float:
    """MaxVio of the worst layer over its largest value: 0 where loads are equal, 1 where all tokens chose the same."""
    largest = largest_violation(load.num_experts or model.n_routed_experts, model.num_experts_per_tok)
    return load.worst_violation / largest if largest > 0 else 0.0
