"""How many workers a run is to have where its job leaves that open, and what Ray's autoscaler is asked for.

    RunState, Observation -> scale_of -> RunScale -> decide_sizes -> a wish for each run that is to change

Runs are served in the order in which they are given. A run is made smaller as soon as there is no room for it, or its
stage wants fewer; it is made larger only when it is steady and has rested. With `throughput` it grows by one worker at
a time, while the last one has added enough and the time saved is more than a rescale costs; a worker that turns out to
add too little goes again.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from orchestrator.policy.capacity import places, without
from orchestrator.policy.limits import RunLimits
from orchestrator.policy.progress import Progress, typical_step_s
from orchestrator.policy.run_state import Observation, RunState
from orchestrator.policy.schedule import wanted_size
from orchestrator.protocol.messages import Phase
from orchestrator.protocol.scaling import RunScale
from orchestrator.spec.autoscale import AVAILABLE, MANUAL, STAGE, THROUGHPUT

MIN_STEPS = 12  # of a size, before its speed is known
STALL_S = 1.0  # what a rescale is taken to cost before one was seen

Resources = Mapping[str, float]


@dataclass(frozen=True)
class Resize:
    """A run is to have another size."""

    run_id: str
    workers: int
    why: str


def scale_of(limits: RunLimits, state: RunState, seen: Observation, request: Resources) -> RunScale:
    """What decides over the run's size, out of its state."""
    spec, progress = limits.autoscale, seen.progress
    wanted = wanted_size(limits, state.wish, seen.step + 1)
    least, most = bounds(limits, progress.stage)
    trains = bool(state.members) and all(seen.phase(worker) is Phase.TRAINING for worker in state.members)
    grown_s = state.wish.grown_s if state.wish else None
    step_s = typical_step_s(progress)
    stalls = [rescale.stall_s for rescale in state.rescales[-3:] if rescale.stall_s is not None]
    return RunScale(
        run_id=limits.run_id,
        policy=spec.policy,
        request=request,
        wanted=wanted,
        least=least,
        most=most,
        standby=limits.standby,
        min_gain=spec.min_gain,
        is_steady=trains and state.next is None and not state.is_ending and len(state.members) == wanted,
        is_pinned=state.wish is not None and state.wish.by_hand,
        rests=grown_s is not None and seen.now_s - grown_s < spec.cooldown_s,
        speeds=speeds(progress),
        stall_s=max(stalls, default=STALL_S),
        left_s=None if step_s is None else step_s * (limits.steps - 1 - seen.step),
        avoid=state.quarantine,
    )


def bounds(limits: RunLimits, stage: str) -> tuple[int, int]:
    """Least and most workers in a stage; before the first step, in the first one."""
    stages = limits.curriculum.stages if limits.curriculum else ()
    present = next((s for s in stages if s.name == stage), stages[0] if stages else None)
    if present is not None and present.workers is not None:
        return present.workers.min, present.workers.max
    if limits.autoscale.policy == STAGE:  # this one names none
        return limits.initial_workers, limits.initial_workers
    return limits.min_workers, limits.max_workers


def speeds(progress: Progress) -> dict[int, float]:
    """Target tokens per second by world size, over the newest steps of the present stage; the median of steps."""
    by_size: dict[int, list[float]] = {}
    for record in progress.recent:
        if record.stage == progress.stage and record.step_s > 0:
            by_size.setdefault(record.world_size, []).append(record.tokens / record.step_s)
    return {size: median(found[-64:]) for size, found in sorted(by_size.items()) if len(found) >= MIN_STEPS}


def decide_sizes(
    runs: Sequence[RunScale], placed: Mapping[str, int], free: Mapping[str, Resources]
) -> tuple[Resize, ...]:
    """The runs that are to change, and to what.

    Args:
        placed: workers of each run that have a place on a node that stays.
        free: what is free on each node that stays.
    """
    return tuple(_decided(runs, placed, free))


def demand(runs: Sequence[RunScale]) -> tuple[Resources, ...]:
    """What Ray's autoscaler is asked to have room for, one entry per worker: those that runs are to have, and those
    that they would have if there were room. Nothing where no run leaves its size open: Ray sees whoever waits for a
    place by itself, and what others have asked it for is left alone."""
    if all(run.policy == MANUAL for run in runs):
        return ()
    return tuple(run.request for run in runs for _ in range(_hoped(run) + run.standby))


def _decided(runs: Sequence[RunScale], placed: Mapping[str, int], free: Mapping[str, Resources]) -> Iterator[Resize]:
    for run in runs:
        usable = {node: amounts for node, amounts in free.items() if node not in run.avoid}
        room = placed.get(run.run_id, 0) + places(list(usable.values()), run.request) - run.standby
        decided = _decide(run, room)
        if decided is not None:
            yield decided
            free = {**free, **without(usable, run.request, decided.workers - run.wanted)}


def _decide(run: RunScale, room: int) -> Resize | None:
    if run.policy == MANUAL or run.is_pinned:
        return None
    if run.wanted > run.most:
        return Resize(run.run_id, run.most, f"no more than {run.most} are wanted now")
    if run.wanted < run.least:
        return Resize(run.run_id, run.least, f"at least {run.least} are wanted now")
    if room < run.wanted and run.wanted > run.least:
        return Resize(run.run_id, max(run.least, room), f"there is room for {max(0, room)}")
    gain = _last_gain(run)
    is_measured = run.policy == THROUGHPUT and run.is_steady and run.wanted > run.least
    if is_measured and gain is not None and gain < run.min_gain:
        return Resize(run.run_id, run.wanted - 1, f"the last worker added {gain:.2f} of what each had done")
    if not run.is_steady or run.rests or min(room, run.most) <= run.wanted:
        return None
    if run.policy in (AVAILABLE, STAGE):
        return Resize(run.run_id, min(room, run.most), f"there is room for {room}")
    why = _worth_another(run)
    return Resize(run.run_id, run.wanted + 1, why) if why else None


def _last_gain(run: RunScale) -> float | None:
    """What the last worker adds to the speed, as a share of what each of the others does; None if that isn't known."""
    here, before = run.speeds.get(run.wanted), run.speeds.get(run.wanted - 1)
    if here is None or before is None:
        return None
    return (here - before) / (before / (run.wanted - 1))


def _worth_another(run: RunScale) -> str:
    """Why another worker is worth its rescale; empty if it isn't, or if that isn't known yet."""
    here = run.speeds.get(run.wanted)
    if here is None or run.left_s is None:
        return ""
    each = here / run.wanted
    more = run.speeds.get(run.wanted + 1)
    last = _last_gain(run)
    gain = (more - here) / each if more is not None else last if last is not None else 1.0
    saved_s = run.left_s * (1 - here / (here + max(0.0, gain) * each))
    if gain < run.min_gain or saved_s <= run.stall_s:
        return ""
    source = "it did before" if more is not None else "the last one did" if last is not None else "it can at most"
    return f"another worker saves {saved_s:.0f} s if it adds {gain:.2f} of what each does, as {source}"


def _hoped(run: RunScale) -> int:
    """How many it would have if there were room."""
    if run.is_pinned or run.policy in (MANUAL, AVAILABLE):
        return run.wanted
    if run.policy == STAGE:
        return max(run.wanted, run.most)
    grows = run.is_steady and not run.rests and run.wanted < run.most and bool(_worth_another(run))
    return run.wanted + grows
