"""Sizes of runs whose jobs leave them open, and the resources requested from Ray's autoscaler.

    RunState, Observation -> scale_of -> ScalingView -> decide_sizes -> a request for each run that is to change

`fair_share` divides the cluster among runs; a run with an open size takes its share. It grows only when it is steady
and its cooldown has passed, and shrinks where its stage wants fewer. With `throughput` it grows by one worker at a
time, while the last one added enough and the time saved is more than a rescale costs. A worker that adds too little is
removed, and the size without it is not exceeded again until the stage changes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.policy.cluster.grants import FairShare
from orchestrator.policy.health.stragglers import is_to_be_replaced
from orchestrator.policy.state.config import RunLimits
from orchestrator.policy.state.progress import NOISE, gain_of, speeds, typical_step_s
from orchestrator.policy.state.run_state import Observation, RunState
from orchestrator.policy.state.world_size import wanted_size, workers_to_hold
from orchestrator.protocol.scaling import ScalingView
from orchestrator.protocol.worker_phase import Phase
from orchestrator.spec.workers import AVAILABLE, MANUAL, STAGE, THROUGHPUT

STALL_S = 1.0  # assumed cost of a rescale before one was measured

Resources = Mapping[str, float]


@dataclass(frozen=True)
class Resize:
    """A decision to give a run another size."""

    run_id: str
    workers: int
    why: str


@dataclass(frozen=True)
class Demand:
    """Resources that one worker reserves, on a node that matches the selector."""

    request: Resources
    selector: Mapping[str, str] = field(default_factory=dict)


def scale_of(
    limits: RunLimits, state: RunState, seen: Observation, request: Resources, submitted_s: float = 0.0
) -> ScalingView:
    """The inputs for decisions on the run's size, from its state. `submitted_s`: `time.time()` of its submission."""
    spec, progress = limits.autoscale, seen.progress
    wanted = wanted_size(limits, state.size_request, seen.step + 1)
    least, most = bounds(limits, progress.stage)
    if state.size_request is not None and state.size_request.by_hand:  # overrides the stage's least
        least = min(least, wanted)
    if (
        state.size_request is not None
        and state.size_request.cap is not None
        and state.size_request.cap_stage == progress.stage
    ):
        most = max(least, min(most, state.size_request.cap))
    trains = bool(state.members) and all(seen.phase(worker) is Phase.TRAINING for worker in state.members)
    grown_s = state.size_request.grown_s if state.size_request else None
    step_s = typical_step_s(progress)
    stalls = [rescale.stall_s for rescale in state.rescales[-3:] if rescale.stall_s is not None]
    return ScalingView(
        run_id=limits.run_id,
        policy=spec.policy,
        request=request,
        wanted=wanted,
        least=least,
        most=most,
        standby=workers_to_hold(limits, state.size_request, seen.step + 1) - wanted + is_to_be_replaced(limits, state),
        min_gain=spec.min_gain,
        is_steady=trains
        and state.next is None
        and not state.is_ending
        and len(state.members) == state.queue.grant.of(wanted),
        has_begun=state.current is not None,
        is_pinned=(state.size_request is not None and state.size_request.by_hand) or state.is_ending,
        rests=grown_s is not None and seen.now_s - grown_s < spec.cooldown_s,
        speeds=speeds(progress),
        stall_s=max(stalls, default=STALL_S),
        left_s=None if step_s is None else step_s * (limits.steps - 1 - seen.step),
        avoid=state.failures.quarantine,
        selector=limits.label_selector,
        priority=limits.priority_of(state.priority),
        submitted_s=submitted_s,
        grant=state.queue.grant,
        queued_s=state.queue.since_s if state.queue.grant.workers == 0 else None,
        admitted_s=state.queue.admitted_s,
        begun_s=state.queue.begun_s,
    )


def bounds(limits: RunLimits, stage: str) -> tuple[int, int]:
    """Least and most workers in a stage; before the first step, in the first one."""
    stages = limits.curriculum.stages if limits.curriculum else ()
    present = next((s for s in stages if s.name == stage), stages[0] if stages else None)
    if present is not None and present.workers is not None:
        return present.workers.min, present.workers.max
    if limits.autoscale.policy == STAGE:  # the stage sets none
        return limits.initial_workers, limits.initial_workers
    return limits.min_workers, limits.max_workers


def decide_sizes(runs: Sequence[ScalingView], shares: Mapping[str, FairShare]) -> tuple[Resize, ...]:
    """Size changes of runs, given each run's share of the cluster."""
    found = (_decide(run, shares[run.run_id]) for run in runs)
    return tuple(resize for resize in found if resize is not None)


def claim_of(run: ScalingView) -> int:
    """Number of workers the run would hold if there were room, standbys included."""
    grows = run.policy == AVAILABLE and not run.is_pinned
    return max(run.least, (max(run.wanted, run.most) if grows else _hoped(run)) + run.standby)


def demand(runs: Sequence[ScalingView]) -> tuple[Demand, ...]:
    """The request to Ray's autoscaler, one entry per worker that runs are to have or would have if there were room.
    Empty where no run leaves its size open or lacks workers: Ray sees pending workers by itself, and requests that
    others made are left alone."""
    if all(run.policy == MANUAL and run.grant.workers is None for run in runs):
        return ()
    return tuple(Demand(run.request, run.selector) for run in runs for _ in range(_hoped(run) + run.standby))


def _decide(run: ScalingView, share: FairShare) -> Resize | None:
    if run.policy == MANUAL or run.is_pinned or run.queued_s is not None:
        return None
    if run.wanted > run.most and run.is_steady:
        return Resize(run.run_id, run.most, f"no more than {run.most} are wanted now")
    if run.wanted < run.least and not run.rests:
        return Resize(run.run_id, run.least, f"at least {run.least} are wanted now")
    gain = gain_of(run.speeds, run.wanted, NOISE)
    is_measured = run.policy == THROUGHPUT and run.is_steady and not run.rests and run.wanted > run.least
    if is_measured and gain is not None and gain < run.min_gain:
        return Resize(run.run_id, run.wanted - 1, f"the last worker added {gain:.2f} of what each had done, at most")
    room = share.places - run.standby
    if run.grant.workers is not None or not run.is_steady or run.rests or min(room, run.most) <= run.wanted:
        return None
    if run.policy in (AVAILABLE, STAGE):
        return Resize(run.run_id, min(room, run.most), f"there is room for {room}")
    why = _worth_another(run)
    return Resize(run.run_id, run.wanted + 1, why) if why else None


def _worth_another(run: ScalingView) -> str:
    """Why another worker is worth its rescale; empty if it isn't, or if that is unknown yet."""
    here = run.speeds.get(run.wanted)
    if here is None or run.left_s is None:
        return ""
    each = here / run.wanted
    more = run.speeds.get(run.wanted + 1)
    last = gain_of(run.speeds, run.wanted, 0.0)
    gain = (more - here) / each if more is not None else last if last is not None else 1.0
    saved_s = run.left_s * (1 - here / (here + max(0.0, gain) * each))
    if gain < run.min_gain or saved_s <= run.stall_s:
        return ""
    source = "it did before" if more is not None else "the last one did" if last is not None else "it can at most"
    return f"another worker saves {saved_s:.0f} s if it adds {gain:.2f} of what each does, as {source}"


def _hoped(run: ScalingView) -> int:
    """Number of workers the run would have if there were room, without standbys."""
    if run.is_pinned or run.policy in (MANUAL, AVAILABLE):
        return run.wanted
    if run.policy == STAGE:
        return max(run.wanted, run.most)
    grows = run.is_steady and not run.rests and run.wanted < run.most and bool(_worth_another(run))
    return run.wanted + grows
