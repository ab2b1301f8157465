"""Status of a run, from its history and its controller's observation."""

import json
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from orchestrator.policy.health.expert_collapse import routing_warnings
from orchestrator.policy.lifecycle import explain, phase_of
from orchestrator.policy.publication import num_uncommitted
from orchestrator.policy.recovery.holders import num_holders
from orchestrator.policy.replay_check import shown
from orchestrator.policy.rescale.generation_plan import warm_standbys
from orchestrator.policy.state.config import RunLimits
from orchestrator.policy.state.progress import tokens_per_second, traffic_per_step
from orchestrator.policy.state.run_state import Observation, RunState
from orchestrator.policy.state.world_size import wanted_size
from orchestrator.protocol.codec import to_plain
from orchestrator.protocol.events.generations import Activated
from orchestrator.protocol.events.run import Ended, Submitted
from orchestrator.protocol.status import RunPhase, RunStatus, WorkerStatus
from orchestrator.run_records.checkpoints.search import path_of
from orchestrator.run_records.job_files import read_job
from orchestrator.run_records.run_history import RunHistory
from orchestrator.spec.model import ModelSpec
from orchestrator.storage.backends.location import Location
from orchestrator.storage.backends.signing_keys import run_objects
from orchestrator.storage.chain_reader import newest_holder
from orchestrator.storage.condition import StorageCondition


def status_of(
    limits: RunLimits,
    model: ModelSpec,
    memory: RunHistory,
    seen: Observation,
    *,
    run_dir: Location,
    tracking_url: str | None = None,
    warning: str | None = None,
    storage: StorageCondition = StorageCondition.WELL,
    preparing: str = "",
    resources: Mapping[str, float] = MappingProxyType({}),
    closed: bool,
) -> RunStatus:
    """The current status. A run that has ended is still finishing until everything of it is `closed`.

    Args:
        storage: condition of run storage.
        preparing: progress of the data that the first step waits for; empty once it is prepared.
        resources: that each worker reserves.
    """
    state, progress = memory.state, memory.progress
    over = state.outcome is not None
    record = memory.checkpoints.of(state.checkpoint_done)
    return RunStatus(
        run_id=limits.run_id,
        run_dir=str(run_dir),
        phase=RunPhase.FINISHING if over and not closed else phase_of(state, seen),
        why=preparing if preparing and not over else explain(limits, state, seen),
        step=progress.watermark + 1,
        steps=limits.steps,
        workers_wanted=0 if over else wanted_size(limits, state.size_request, seen.step + 1, state.queue.grant),
        workers_now=0 if over else len(state.members),
        standbys=0 if over else len(warm_standbys(state, seen)),
        generation=state.activated,
        loss=progress.loss,
        first_loss=progress.first_loss,
        validation_loss=progress.validation_loss,
        first_validation_loss=progress.first_validation_loss,
        tokens_per_second=tokens_per_second(progress),
        unit=limits.unit,
        metrics=progress.recent[-1].metrics if progress.recent else {},
        validation_metrics=progress.validation_metrics,
        rescales=state.rescales,
        recoveries=state.recoveries,
        checkpoint=str(path_of(run_dir, record)) if record else None,
        checkpoint_step=record.step if record else None,
        tracking_url=tracking_url,
        warning="; ".join(
            text
            for text in (warning, _doubt(state), _unlike(memory), *routing_warnings(model, memory.troubles))
            if text
        )
        or None,
        storage=storage,
        error=state.why if state.outcome is RunPhase.FAILED else None,
        traceback=(state.traceback or None) if state.outcome is RunPhase.FAILED else None,
        submitted_time=memory.times.get(Submitted),
        started_time=memory.times.get(Activated),
        ended_time=memory.times.get(Ended),
        stage=progress.stage,
        traffic=traffic_per_step(progress),
        resources=dict(resources),
        worker_group=_worker_group(state, seen),
        priority=limits.priority_of(state.priority),
        held_by=num_holders(state, seen),
        uncommitted=num_uncommitted(limits, state, seen),
        rank_violation=progress.recent[-1].routing.experts.rank_violation if progress.recent and not over else None,
        as_of_time=seen.now_s or None,
    )


def _doubt(state: RunState) -> str | None:
    """Warning of wrong steps found by replay checks, on which all later steps build."""
    if not state.replay.differences:
        return None
    return (
        f"step {min(state.replay.differences)} did not reproduce on a standby: suspect faulty CPU or memory; "
        "see `orchestrator events`. To go back, pause the run if it trains, and resume it with --step from a "
        "checkpoint before it"
    )


def _unlike(memory: RunHistory) -> str | None:
    """Warning of workers that have trained with other bits than the run's first worker, where that matters, or on
    another kind of GPU."""
    differing = {worker: memory.differing[worker] for worker in memory.first_steps if worker in memory.differing}
    if not differing:
        return None
    if list(memory.numerics or ()) == ["gpu"]:  # the run is not exact
        return (
            f"workers have another kind of GPU than the first one: {shown(differing)}; a step takes as long as on the "
            "slowest. To have one kind, name it in workers.label_selector, as ray.io/accelerator-type"
        )
    return (
        f"workers whose numerics differ from the run's have trained: {shown(differing)}; its bits differ since. To get "
        "the original bits, pause the run if it trains, and resume it with --step from a checkpoint before, on "
        "machines like its first one"
    )


def _worker_group(state: RunState, seen: Observation) -> tuple[WorkerStatus, ...]:
    """Workers that are not known to have failed; all are dismissed at the run's end."""
    ranks = {worker: rank for rank, worker in enumerate(state.members)}
    others = [worker for worker in state.worker_group if worker not in ranks]
    there = [worker for worker in (*state.members, *others) if worker in state.worker_group and worker not in seen.lost]
    return tuple(WorkerStatus(w, ranks.get(w), seen.phase(w), seen.nodes.get(w, "")) for w in there)


def status_from_journal(run_dir: Location) -> RunStatus:
    """Status as of the journal's newest entry, for a run that has not ended. Needs no cluster."""
    job = read_job(run_dir)
    limits = RunLimits.of(run_dir.name, job)
    memory = RunHistory(run_dir, limits)
    seen = Observation(term=0, now_s=0.0, target=memory.state.target, progress=memory.progress)
    status = status_of(limits, job.model, memory, seen, run_dir=run_dir, closed=False)
    writer = newest_holder(run_objects(run_dir)).process or "its controller"
    why = f"it has not ended, according to its journal, which {writer} writes; only the run's cluster knows more"
    return replace(status, worker_group=(), why=why)


def to_json(status: RunStatus) -> str:
    return json.dumps(to_plain(status), indent=2) + "\n"
