"""Steps done again, and compared: when a standby is to do it, and what its answer means.

A step's record tells the loss, the gradients' norm, and a digest of what each rank has come to. Where training is
exact, whoever does the step again has the same ones, in whatever world. The first step that differs tells what was
wrong. If it is nothing but the state of some ranks, their updates went wrong, or their memory changed; or a gradient of
what they update, by too little to show in the norm. If it is the loss or the norm, it came in by what all ranks have
made together, and whoever updates what it has changed isn't to blame.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.policy.rescale.generation_plan import warm_standbys
from orchestrator.policy.state.config import RunLimits
from orchestrator.policy.state.run_state import Decision, Observation, RunState
from orchestrator.protocol.events.notices import ReplayChecked, ReplayFailed, StateDiffers
from orchestrator.protocol.messages import PastWorld, ReplayResult, ReplayTask, StepFingerprint, StepRecord


@dataclass(frozen=True)
class Difference:
    """The first step that came out otherwise.

    Args:
        parts: what of it: loss, grad_norm, state.
        ranks: whose state, where that alone differs, and not everybody's.
    """

    step: int
    parts: tuple[str, ...]
    ranks: tuple[int, ...] = ()


def first_difference(
    records: Sequence[StepRecord | StepFingerprint], again: Sequence[StepRecord | StepFingerprint]
) -> Difference | None:
    """Between steps and the same steps done again. What one side only has doesn't count: steps, digests."""
    repeated = {record.step: record for record in again}
    for record in records:
        other = repeated.get(record.step)
        if other is not None and (difference := _difference(record, other)) is not None:
            return difference
    return None


def _difference(record: StepRecord | StepFingerprint, other: StepRecord | StepFingerprint) -> Difference | None:
    ranks = [rank for rank, (a, b) in enumerate(zip(record.digests, other.digests, strict=False)) if a != b]
    values = {name: (getattr(record, name), getattr(other, name)) for name in ("loss", "grad_norm")}
    # By its digits: NaN is like itself then.
    parts = (*(name for name, (a, b) in values.items() if repr(a) != repr(b)), *(["state"] if ranks else []))
    told = ranks if parts == ("state",) and len(ranks) < len(record.digests) else []
    return Difference(record.step, parts, tuple(told)) if parts else None


def watch_checks(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """Have a standby do steps again when that is due, and tell what came of it. A rule of `lifecycle`."""
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
        worker=standbys[-1],  # the last to be taken into a world
        step=first,
        last_step=last,
        worlds=(PastWorld(0, state.current.world, state.current.placement, state.current.micro_batch),),
        findings=tuple(StepFingerprint(record.step, record.loss, record.grad_norm, record.digests) for record in done),
        skips=tuple(step for step in state.failures.skips if first < step <= last),
    )
    return Decision(
        replace(state, replay=replace(state.replay, task=check, count=check.number + 1, last_step=check.step))
    )


def _is_due(every: int, steps: int, state: RunState, seen: Observation) -> bool:
    """The newest checkpoint has enough steps behind it, all of the present world and in an order that it knew of."""
    first, last = state.checkpoint_done, state.checkpoint_done + steps
    is_new = state.replay.count == 0 or (first > state.replay.last_step and first - state.replay.last_step >= every)
    if first < 0 or not is_new or seen.progress.watermark < last:
        return False
    done = [record for record in seen.progress.recent if first < record.step <= last]
    assert state.current is not None
    in_one_world = all(record.generation == state.current.generation for record in done)
    as_known = not any(first < stage.first_step <= last for stage in state.curriculum.stages)
    return len(done) == steps and in_one_world and as_known


def _computes_alike(state: RunState, seen: Observation, worker: str) -> bool:
    """Its numerics are those of all members: others come to other bits, with nothing wrong."""
    told = {report.numerics for w in (worker, *state.members) if (report := seen.reports.get(w)) is not None}
    return len(told) == 1


def _hear(state: RunState, check: ReplayTask, seen: Observation) -> Decision:
    report = seen.reports.get(check.worker)
    if check.worker not in state.worker_group or report is None:
        return Decision(replace(state, replay=replace(state.replay, task=None)))
    answer = report.checked
    if answer is None or answer.number != check.number:
        never = check.worker in state.members  # it was taken in before it came to it
        return Decision(replace(state, replay=replace(state.replay, task=None)) if never else state)
    return _compare(replace(state, replay=replace(state.replay, task=None)), check, answer, seen)


def _compare(state: RunState, check: ReplayTask, answer: ReplayResult, seen: Observation) -> Decision:
    if answer.error:
        return Decision(state, (ReplayFailed(check.worker, check.step, answer.error),))
    if not answer.findings:
        return Decision(state)  # it was needed elsewhere
    difference = first_difference(check.findings, answer.findings)
    checked = ReplayChecked(check.worker, check.step + 1, answer.findings[-1].step, equal=difference is None)
    if difference is None:
        return Decision(state, (checked,))
    differs = state_differs(difference, check.worlds, seen.nodes)
    differences = (*state.replay.differences, difference.step)
    return Decision(replace(state, replay=replace(state.replay, differences=differences)), (checked, differs))


def state_differs(difference: Difference, worlds: Sequence[PastWorld], nodes: Mapping[str, str]) -> StateDiffers:
    """A difference as an event: with the workers that had the ranks then, and the nodes where they live."""
    world = next(past.world for past in reversed(worlds) if past.first_step <= difference.step)
    workers = tuple(world.members[rank] for rank in difference.ranks)
    places = tuple(nodes.get(worker, "") for worker in workers)
    return StateDiffers(difference.step, difference.parts, difference.ranks, workers, places)


# -- Numerics fingerprints, of which `engine.numerics` tells what is in one: who has the same computes the same bits ---

Differences = Mapping[str, str]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """In words, by key."""
    keys = sorted(before.keys() | now.keys())
    return {key: f"{before.get(key)} -> {now.get(key)}" for key in keys if before.get(key) != now.get(key)}


def shown(differing: Mapping[str, Differences]) -> str:
    """Workers with what of their fingerprint is another: `w2, w3 (instructions: AVX512 -> AVX2)`."""
    alike: dict[str, list[str]] = {}
    for worker, differs in differing.items():
        alike.setdefault(", ".join(f"{key}: {change}" for key, change in differs.items()), []).append(worker)
    return "; ".join(f"{', '.join(workers)} ({told})" for told, workers in alike.items())


def doubt(members: Sequence[str], differing: Mapping[str, Differences], here: Differences) -> str:
    """Why steps done again here may differ with nothing wrong: whoever did them computes other bits. Empty if not.

    Args:
        members: the workers that did them.
        differing: of them, those whose numerics aren't those of the run's first worker.
        here: how this process's numerics are others than that one's.
    """
    if all(differing.get(member, {}) == here for member in members):
        return ""
    others = {member: differing[member] for member in members if member in differing}
    told = shown(others | ({"this process": here} if here else {}))
    return f"The numerics of whoever did these steps are not those here, which may be all that differs: {told}."
