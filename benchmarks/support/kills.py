"""Workers of a baseline killed one after another, and how long it takes each time until training goes on.

A kill is SIGKILL of one worker's process by its pid, never of rank 0. The clock is the one that ours is measured by:
from right before the signal to the end of the first step that no worker had finished before it, less the median of the
steps after it. So it holds everything: noticing, new processes, loading, and steps done again.
"""

import os
import signal
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

from benchmarks.harness import say
from benchmarks.support.trace import FinishedStep, Trace

LOOK_EVERY_S = 0.02
PATIENCE_S = 180.0
STEPS_BETWEEN = 10  # never done before, from a recovery to the next kill
STEPS_SINCE_CHECKPOINT = (2, 4, 1, 3, 0)  # when the kill of a round comes
MOMENT_SHIFT = (
    0.618  # of a step: how much later within its step a kill comes than the one before, so all get their turn
)


def kill_in_turn(
    trace: Trace, rounds: int, checkpoint_every: int, is_running: Callable[[], bool]
) -> list[dict[str, Any]]:
    """Kill a worker `rounds` times, each time at another moment, and watch every recovery.

    Args:
        trace: of the run; every rank tells of every step. There must be two ranks or more.
        is_running: whether the run lives at all.

    Returns:
        Per round what `recovery` gives.

    Raises:
        RuntimeError: the run ended, or did not go on within `PATIENCE_S`.
    """

    def wait(condition: Callable[[list[FinishedStep]], bool], what: str) -> list[FinishedStep]:
        deadline_s = time.monotonic() + PATIENCE_S
        while not condition(steps := trace.steps()):
            if not is_running() or time.monotonic() > deadline_s:
                raise RuntimeError(f"waiting until {what}, but the run {'hangs' if is_running() else 'has ended'}")
            time.sleep(LOOK_EVERY_S)
        return steps

    fault_time, measured = 0.0, []
    wait(lambda steps: len(never_done(steps, 0.0)) >= STEPS_BETWEEN, "it trains")
    for number in range(rounds):
        since = STEPS_SINCE_CHECKPOINT[number % len(STEPS_SINCE_CHECKPOINT)]
        steps = wait(lambda steps, n=since: (steps[-1].step + 1) % checkpoint_every == n, f"{since} steps aren't saved")
        time.sleep((0.5 + number * MOMENT_SHIFT) % 1.0 * step_s(never_done(steps, fault_time)))
        victim = 1 + number % (steps[-1].size - 1)
        pid = next(step.pid for step in reversed(steps) if step.rank == victim)
        fault_time = time.time()
        os.kill(pid, signal.SIGKILL)
        steps = wait(lambda steps, t=fault_time: len(never_done(steps, t)) >= STEPS_BETWEEN, "it trains on")
        measured.append(recovery(steps, fault_time, trace.notice_times()))
        say(f"round {number + 1}: {measured[-1]}")
    return measured


def recovery(steps: Sequence[FinishedStep], fault_time: float, notice_times: Sequence[float]) -> dict[str, Any]:
    """What a fault has cost: the stall and the finished steps that were done again.

    `restart_s` is the stall without those steps, `detect_s` the time until whoever starts workers knew; None if it did
    not tell.

    Raises:
        ValueError: no two steps were done that hadn't been done before.
    """
    new = never_done(steps, fault_time)
    own_step_s = step_s(new)
    highest = min(new) - 1
    old = {step.pid for step in steps if step.end_time < fault_time}
    again = [step for step in steps if step.pid not in old and step.step <= highest]
    first_end_time = min(step.end_time for step in steps if step.pid not in old)
    noticed = [told for told in notice_times if told > fault_time]
    return {
        "stall_s": min(new.values()) - fault_time - own_step_s,
        "steps_replayed": len({step.step for step in again}),
        "detect_s": min(noticed) - fault_time if noticed else None,
        "restart_s": first_end_time - fault_time - own_step_s,
        "step_s": own_step_s,
    }


def never_done(steps: Sequence[FinishedStep], fault_time: float) -> dict[int, float]:
    """Of the processes that had done nothing before the fault: the steps beyond all that were done before it, and when
    the first rank had done each. What the old processes still finish is no recovery: it goes with them."""
    before = [step for step in steps if step.end_time < fault_time]
    old, highest = {step.pid for step in before}, max((step.step for step in before), default=-1)
    ends: dict[int, float] = {}
    for step in sorted(steps, key=lambda step: step.end_time):
        if step.pid not in old and step.step > highest:
            ends.setdefault(step.step, step.end_time)
    return ends


def step_s(ends: dict[int, float]) -> float:
    """The median time from one step's end to the next one's. Raises ValueError for fewer than two steps."""
    if len(ends) < 2:
        raise ValueError(f"the time of a step was asked for after {len(ends)} steps; it takes two")
    return median(b - a for a, b in pairwise(ends.values()))
