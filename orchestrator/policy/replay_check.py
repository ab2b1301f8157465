"""Replay checks: when a standby repeats committed steps, and what a difference means.

A step's record holds the loss, the gradients' norm, and a digest of each rank's state. Where training is exact, a
replay of the step gives the same values in any world. The first step that differs shows the fault. If only the state of
some ranks differs, their updates went wrong or their memory changed; or a gradient of the parameters that they update
was wrong, by too little to show in the norm. If the loss or the norm differs, the fault entered a result of all ranks
together, and the ranks that update the affected parameters aren't to blame.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.policy.rescale.generation_plan import warm_standbys
from orchestrator.policy.state.config import RunLimits
from orchestrator.policy.state.run_state import Decision, Observation, RunState
from orchestrator.protocol.events.notices import ReplayChecked, ReplayFailed, StateDiffers
from orchestrator.protocol.messages import GenerationPlan
from orchestrator.protocol.replay_task import PastWorld, ReplayTask, StepFingerprint
from orchestrator.protocol.worker_report import ReplayResult


@dataclass(frozen=True)
class Difference:
    """The first step that did not reproduce.

    Args:
        parts: which of loss, grad_norm, state differ.
        ranks: those whose state differs, where the state alone differs and not on all ranks.
    """

    step: int
    parts: tuple[str, ...]
    ranks: tuple[int, ...] = ()


def first_difference(records: Sequence[StepFingerprint], again: Sequence[StepFingerprint]) -> Difference | None:
    """The first difference between steps and their replay. Steps and digests that only one side has are ignored."""
    repeated = {record.step: record for record in again}
    for record in records:
        other = repeated.get(record.step)
        if other is not None and (difference := _difference(record, other)) is not None:
            return difference
    return None


def _difference(record: StepFingerprint, other: StepFingerprint) -> Difference | None:
    ranks = [rank for rank, (a, b) in enumerate(zip(record.digests, other.digests, strict=False)) if a != b]
    values = {name: (getattr(record, name), getattr(other, name)) for name in ("loss", "grad_norm")}
    # Compared by repr, so that NaN equals NaN.
    parts = (*(name for name, (a, b) in values.items() if repr(a) != repr(b)), *(["state"] if ranks else []))
    some = ranks if parts == ("state",) and len(ranks) < len(record.digests) else []
    return Difference(record.step, parts, tuple(some)) if parts else None


def watch_checks(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """Assign a replay to a standby when one is due, and report its result. A rule of `lifecycle`."""
    if state.replay.task is not None:
        return _hear(state, state.replay.task, seen)
    standbys = [worker for worker in warm_standbys(state, seen) if _computes_alike(state, seen, worker)]
    if limits.verify.every is None or state.current is None or not standbys or state.next is not None:
        return Decision(state)
    if state.is_ending or state.is_recovering or not _is_due(limits.verify.every, limits.verify.steps, state, seen):
        return Decision(state)
    first, last = state.checkpoint_done, state.checkpoint_done + limits.verify.steps
    done = (record for record in seen.progress.recent if first < record.step <= last)
    check = ReplayTask(
        number=state.replay.count,
        worker=standbys[-1],  # the last in line to join a world
        step=first,
        path=seen.checkpoints[first],
        last_step=last,
        worlds=(_past(state.current),),
        findings=tuple(map(StepFingerprint.of, done)),
        skips=tuple(step for step in state.failures.skips if first < step <= last),
    )
    return Decision(
        replace(state, replay=replace(state.replay, task=check, count=check.number + 1, last_step=check.step))
    )


def _past(plan: GenerationPlan) -> PastWorld:
    return PastWorld(0, plan.world, plan.placement, plan.micro_batch, plan.families)


def _is_due(every: int, steps: int, state: RunState, seen: Observation) -> bool:
    """Whether enough steps follow the newest checkpoint, all in the present world, with no decided stage among them."""
    first, last = state.checkpoint_done, state.checkpoint_done + steps
    is_new = state.replay.count == 0 or (first > state.replay.last_step and first - state.replay.last_step >= every)
    if first not in seen.checkpoints or not is_new or seen.progress.watermark < last:
        return False
    done = [record for record in seen.progress.recent if first < record.step <= last]
    assert state.current is not None
    in_one_world = all(record.generation == state.current.generation for record in done)
    as_known = not any(first < stage.first_step <= last for stage in state.curriculum.stages)
    has_other_experts = state.experts.at(first + 1) is not None  # than the checkpoint
    return len(done) == steps and in_one_world and as_known and not has_other_experts


def _computes_alike(state: RunState, seen: Observation, worker: str) -> bool:
    """Whether it has the numerics of all members: with others, bits differ without a fault."""
    numerics = {
        report.process.numerics for w in (worker, *state.members) if (report := seen.reports.get(w)) is not None
    }
    return len(numerics) == 1


def _hear(state: RunState, check: ReplayTask, seen: Observation) -> Decision:
    report = seen.reports.get(check.worker)
    if check.worker not in state.worker_group or report is None:
        return Decision(replace(state, replay=replace(state.replay, task=None)))
    answer = report.checked
    if answer is None or answer.number != check.number:
        never = check.worker in state.members  # it joined the world before it could replay
        return Decision(replace(state, replay=replace(state.replay, task=None)) if never else state)
    return _compare(replace(state, replay=replace(state.replay, task=None)), check, answer, seen)


def _compare(state: RunState, check: ReplayTask, answer: ReplayResult, seen: Observation) -> Decision:
    if answer.error:
        return Decision(state, (ReplayFailed(check.worker, check.step, answer.error),))
    if not answer.findings:
        return Decision(state)  # cancelled: the worker was needed elsewhere
    difference = first_difference(check.findings, answer.findings)
    checked = ReplayChecked(check.worker, check.step + 1, answer.findings[-1].step, equal=difference is None)
    if difference is None:
        return Decision(state, (checked,))
    differs = state_differs(difference, check.worlds, seen.nodes)
    differences = (*state.replay.differences, difference.step)
    return Decision(replace(state, replay=replace(state.replay, differences=differences)), (checked, differs))


def state_differs(difference: Difference, worlds: Sequence[PastWorld], nodes: Mapping[str, str]) -> StateDiffers:
    """The event for a difference, with the workers that had the ranks at that step, and their nodes."""
    world = next(past.world for past in reversed(worlds) if past.first_step <= difference.step)
    workers = tuple(world.members[rank] for rank in difference.ranks)
    places = tuple(nodes.get(worker, "") for worker in workers)
    return StateDiffers(difference.step, difference.parts, difference.ranks, workers, places)


# -- Numerics fingerprints (contents: `engine.numerics`): workers with equal ones compute the same bits ----------------

Differences = Mapping[str, str]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Changes between two fingerprints as text, by key."""
    keys = sorted(before.keys() | now.keys())
    return {key: f"{before.get(key)} -> {now.get(key)}" for key in keys if before.get(key) != now.get(key)}


def shown(differing: Mapping[str, Differences]) -> str:
    """Workers with the differing parts of their fingerprints: `w2, w3 (instructions: AVX512 -> AVX2)`."""
    alike: dict[str, list[str]] = {}
    for worker, differs in differing.items():
        alike.setdefault(", ".join(f"{key}: {change}" for key, change in differs.items()), []).append(worker)
    return "; ".join(f"{', '.join(workers)} ({changes})" for changes, workers in alike.items())


def doubt(members: Sequence[str], differing: Mapping[str, Differences], here: Differences) -> str:
    """Why a replay in this process may differ without a fault: its numerics are not the workers'. Empty if they are.

    Args:
        members: the workers that did the steps.
        differing: those of them whose numerics differ from those of the run's first worker.
        here: how this process's numerics differ from that worker's.
    """
    if all(differing.get(member, {}) == here for member in members):
        return ""
    others = {member: differing[member] for member in members if member in differing}
    text = shown(others | ({"this process": here} if here else {}))
    return f"Numerics differ between the workers of these steps and this process, which may be the only cause: {text}."
