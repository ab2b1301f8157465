"""How many workers runs get, from what is free, what their stage names and what they were measured to gain."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.policy.cluster.autoscaling import Demand, bounds, claim_of, decide_sizes, demand, scale_of
from orchestrator.policy.cluster.fair_share import divide
from orchestrator.policy.cluster.grants import FairShare
from orchestrator.policy.rescale.worker_pool import apply_target
from orchestrator.policy.state.progress import MIN_STEPS, Progress, absorb, speeds
from orchestrator.policy.state.world_size import SizeRequest
from orchestrator.protocol.messages import DesiredRunState
from orchestrator.protocol.scaling import UNLIMITED, Grant, ScalingView
from orchestrator.protocol.step_record import StepRecord
from orchestrator.spec.curriculum import CurriculumSpec
from orchestrator.spec.workers import AutoscaleSpec, ScheduledScale
from tests.unit.policy.imagined import Life, limits_of, record

CPU = {"CPU": 1.0}


def _run(**changes: Any) -> ScalingView:
    plain = ScalingView("run", "available", CPU, wanted=2, least=1, most=4, is_steady=True, left_s=1000.0)
    return replace(plain, **changes)


def _shares(
    runs: Sequence[ScalingView], homes: dict[str, int], free: dict[str, dict[str, float]]
) -> dict[str, FairShare]:
    """Args: how many workers of each run are placed, on no node that is free."""
    claims = {run.run_id: claim_of(run) for run in runs}
    return divide(runs, claims, {run: ["elsewhere"] * n for run, n in homes.items()}, free, 0.0)


def _decide(run: ScalingView, free: float, placed: int | None = None) -> tuple[int, str] | None:
    """With `free` processors free, and by default as many workers placed as are wanted."""
    homes = {"run": run.wanted + run.standby if placed is None else placed}
    found = decide_sizes([run], _shares([run], homes, {"node": {"CPU": free}}))
    return (found[0].workers, found[0].why) if found else None


def _changes(
    runs: Sequence[ScalingView], homes: dict[str, int], free: dict[str, dict[str, float]]
) -> list[tuple[str, int]]:
    return [(resize.run_id, resize.workers) for resize in decide_sizes(runs, _shares(runs, homes, free))]


def test_what_is_free_is_used_up_to_the_most() -> None:
    assert _decide(_run(), 0.0) is None
    assert _decide(_run(), 1.0) == (3, "there is room for 3")
    assert _decide(_run(), 9.0) == (4, "there is room for 4")
    assert _decide(_run(wanted=4), 9.0) is None
    assert _decide(_run(standby=1), 1.0) == (3, "there is room for 3")
    assert _decide(_run(standby=1), 0.0) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"is_steady": False},
        {"rests": True},
        {"is_pinned": True},
        {"policy": "manual"},
        {"queued_s": 0.0},
        {"grant": Grant(2)},
    ],
)
def test_a_run_grows_only_when_it_may(changes: dict[str, Any]) -> None:
    assert _decide(_run(**changes), 9.0) is None


def test_workers_that_have_no_place_are_not_waited_for() -> None:
    """What a run wants stays; it is held to what there is."""
    run = _run(wanted=4, is_steady=False, rests=True)
    shares = _shares([run], {"run": 2}, {})
    assert shares["run"] == FairShare(2, Grant(2, "there is room for 2")) and decide_sizes([run], shares) == ()
    fewest = _shares([_run(wanted=4, least=3)], {"run": 1}, {})
    assert fewest["run"].grant.workers == 3  # fewer it may not have


def test_a_stage_bounds_the_size_at_once() -> None:
    assert _decide(_run(wanted=4, most=2, rests=True), 0.0) == (2, "no more than 2 are wanted now")
    assert _decide(_run(wanted=1, least=3, is_steady=False), 0.0) == (3, "at least 3 are wanted now")


def test_the_first_run_is_served_first() -> None:
    runs = [_run(run_id="a"), _run(run_id="b", request={"CPU": 2.0}, submitted_s=1.0)]
    assert _changes(runs, {"a": 2, "b": 2}, {"node": {"CPU": 3.0}}) == [("a", 4)]
    assert _changes(runs, {"a": 2, "b": 2}, {"node": {"CPU": 4.0}}) == [("a", 4), ("b", 3)]
    assert _changes([runs[0], replace(runs[1], priority=1)], {"a": 2, "b": 2}, {"node": {"CPU": 3.0}}) == [
        ("a", 3),
        ("b", 3),
    ]


def test_nodes_that_a_run_avoids_have_no_room_for_it() -> None:
    free = {"good": {"CPU": 1.0}, "bad": {"CPU": 1.0}}
    runs = [_run(run_id="a", avoid=("bad",)), _run(run_id="b")]
    homes = {"a": 2, "b": 2}
    assert _changes(runs, homes, free) == [("a", 3), ("b", 3)]
    assert _changes(runs[:1], homes, {"bad": {"CPU": 1.0}}) == []


def test_a_place_that_another_run_is_to_have_is_not_free() -> None:
    """Whoever has lost a worker, or waits for its first ones, gets its places before another one grows."""
    free = {"node": {"CPU": 1.0}}
    for policy in ("manual", "available"):
        runs = [_run(run_id="a"), _run(run_id="b", policy=policy, wanted=3, most=3, is_steady=False, submitted_s=1.0)]
        assert _changes(runs, {"a": 2, "b": 2}, free) == []
        assert _changes(runs, {"a": 2, "b": 3}, free) == [("a", 3)]


def test_a_member_is_not_given_up_for_a_standby() -> None:
    run = _run(standby=1)
    shares = _shares([run], {"run": 2}, {})
    assert shares["run"].grant.of(run.wanted) == 2 and decide_sizes([run], shares) == ()


# -- by throughput ---------------------------------------------------------------------------------------------------


def _fast(speeds: dict[int, float], **changes: Any) -> ScalingView:
    return _run(policy="throughput", speeds=speeds, **changes)


def test_it_grows_by_one_while_that_pays() -> None:
    assert _decide(_fast({}), 9.0) is None  # nothing is known yet
    found = _decide(_fast({2: 200.0}), 9.0)
    assert found == (3, "another worker saves 333 s if it adds 1.00 of what each does, as it can at most")
    found = _decide(_fast({2: 200.0, 3: 280.0}, wanted=3), 9.0)
    assert found == (4, "another worker saves 211 s if it adds 0.80 of what each does, as the last one did")


def test_a_worker_that_adds_too_little_goes_and_does_not_come_back() -> None:
    assert _decide(_fast({2: 200.0, 3: 230.0}, wanted=3), 9.0) == (
        2,
        "the last worker added 0.37 of what each had done, at most",
    )
    assert _decide(_fast({2: 200.0, 3: 230.0}), 9.0) is None
    assert _decide(_fast({2: 200.0, 3: 230.0}, min_gain=0.2), 9.0) is not None
    assert _decide(_fast({2: 200.0, 3: 230.0}, wanted=3, least=3), 9.0) is None


def test_a_rescale_must_save_more_than_it_costs() -> None:
    assert _decide(_fast({2: 200.0}, left_s=3.0, stall_s=1.1), 9.0) is None
    assert _decide(_fast({2: 200.0}, left_s=3.0, stall_s=0.9), 9.0) is not None


# -- what is asked of Ray's autoscaler -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "workers"),
    [
        (_run(), 2),
        (_run(standby=2), 4),
        (_run(policy="stage"), 4),
        (_run(policy="stage", is_pinned=True), 2),
        (_fast({2: 200.0}), 3),
        (_fast({2: 200.0}, rests=True), 2),
        (_fast({2: 200.0, 3: 210.0}), 2),
    ],
)
def test_demand_is_what_runs_would_have_if_there_were_room(run: ScalingView, workers: int) -> None:
    assert demand([run]) == (Demand(CPU),) * workers


def test_requests_of_others_are_unchanged_if_no_run_leaves_its_size_open() -> None:
    by_hand = _run(policy="manual", wanted=3)
    assert demand([]) == demand([by_hand]) == ()
    assert demand([by_hand, _run()]) == (Demand(CPU),) * 5  # all that there is to be room for
    more = replace(by_hand, grant=Grant(1))  # it waits for more, and Ray doesn't see that
    assert demand([more]) == (Demand(CPU),) * 3


def test_demand_is_for_nodes_of_the_runs_pool() -> None:
    runs = [_run(wanted=1, selector={"pool": "a"}), _run(wanted=2)]
    assert demand(runs) == (Demand(CPU, {"pool": "a"}), Demand(CPU), Demand(CPU))


# -- what is known of a run ------------------------------------------------------------------------------------------


def _progress(*sizes: tuple[int, int, float, str]) -> Progress:
    """Of (world size, steps, seconds a step, stage)."""
    records: list[StepRecord] = []
    for size, steps, step_s, stage in sizes:
        records += [record(len(records) + i, world_size=size, step_s=step_s, stage=stage) for i in range(steps)]
    return absorb(Progress(), records)


def test_speeds_are_those_of_the_present_stage() -> None:
    progress = _progress((1, 40, 1.0, "a"), (1, MIN_STEPS, 0.5, "b"), (2, MIN_STEPS, 0.25, "b"), (3, 3, 0.1, "b"))
    assert speeds(progress) == {1: 200.0, 2: 400.0}


def test_bounds_are_those_of_the_stage_and_else_of_the_job() -> None:
    stages = ({"name": "a", "workers": {"min": 1, "max": 2}, "until": {"steps": 5}}, {"name": "b"})
    limits = limits_of(curriculum=CurriculumSpec.model_validate({"stages": stages}), max_workers=3)
    assert bounds(limits, "") == bounds(limits, "a") == (1, 2)
    assert bounds(limits, "b") == (1, 3)
    by_stage = replace(limits, autoscale=AutoscaleSpec(policy="stage"))
    assert bounds(by_stage, "b") == (2, 2)  # workers.initial


def _request_size(life: Life, workers: int, by_hand: bool) -> None:
    life.target = DesiredRunState(seq=life.target.seq + 1, workers=workers, by_hand=by_hand)


def _scale(life: Life) -> ScalingView:
    return scale_of(life.limits, life.state, life.seen(), CPU)


def test_the_scaling_view_of_a_run() -> None:
    life = Life(limits_of(steps=200, autoscale=AutoscaleSpec(policy="available", cooldown_s=20.0)))
    assert not _scale(life).is_steady
    life.run_until(lambda: life.step == 20)
    found = _scale(life)
    assert (found.wanted, found.least, found.most) == (2, 1, 4)
    assert found.is_steady and not found.is_pinned and not found.rests
    assert found.speeds == {2: 100.0} and found.left_s == 179.0
    _request_size(life, 3, by_hand=False)
    life.tick()
    grown_s = life.now_s
    assert _scale(life).wanted == 3 and not _scale(life).is_steady
    life.run_until(lambda: len(life.state.members) == 3 and _scale(life).is_steady)
    assert _scale(life).rests
    life.run_until(lambda: life.now_s > grown_s + 20.0)
    assert not _scale(life).rests
    _request_size(life, 2, by_hand=False)
    life.run_until(lambda: len(life.state.members) == 2 and _scale(life).is_steady)
    assert not _scale(life).rests  # it may grow again at once: only growing makes it rest
    _request_size(life, 4, by_hand=True)
    life.run_until(lambda: len(life.state.members) == 4)
    assert _scale(life).is_pinned
    _request_size(life, 4, by_hand=False)
    life.tick()
    assert not _scale(life).is_pinned and _scale(life).wanted == 4


def test_the_scaling_view_includes_workers_of_a_scheduled_size() -> None:
    """They are held from the beginning: no other run gets their places."""
    life = Life(limits_of(steps=90, initial_workers=1, schedule=(ScheduledScale(at_step=50, workers=4),)))
    life.run_until(lambda: life.step == 10)
    assert len(life.state.worker_group) == 4 and _scale(life).full == 4


def test_a_size_by_hand_is_the_least_that_is_kept_for_a_run() -> None:
    life = Life(limits_of(steps=90, initial_workers=4, autoscale=AutoscaleSpec(policy="stage")))
    life.run_until(lambda: life.step == 3)
    assert _scale(life).least == 4
    _request_size(life, 2, by_hand=True)
    life.run_until(lambda: life.sizes[-1] == 2)
    assert (_scale(life).least, claim_of(_scale(life))) == (2, 2)


def test_an_ending_run_is_left_alone() -> None:
    life = Life(limits_of(steps=200, autoscale=AutoscaleSpec(policy="available")))
    life.run_until(lambda: life.step == 5)
    life.holds_still = True
    life.stop_run()
    life.tick()
    assert decide_sizes([_scale(life)], {"run": FairShare(9, UNLIMITED)}) == ()


def test_a_size_that_gained_too_little_is_not_tried_again_in_this_stage() -> None:
    limits = limits_of(steps=900, autoscale=AutoscaleSpec(policy="throughput", cooldown_s=0.0))
    life = Life(limits)
    life.run_until(lambda: life.step == 5)
    life.progress = _progress((2, 40, 0.25, ""), (3, 40, 0.22, ""))  # 400 and 455 tokens a second
    life.state = replace(life.state, size_request=SizeRequest(3, 0))
    seen = life.seen(target=DesiredRunState(seq=9, workers=2, by_hand=False))
    capped = apply_target(limits, life.state, seen).state
    assert capped.size_request is not None and (capped.size_request.cap, capped.size_request.cap_stage) == (2, "")
    assert scale_of(limits, capped, seen, CPU).most == 2
    elsewhere = life.seen(progress=_progress((2, 40, 0.25, "b")))
    assert scale_of(limits, capped, elsewhere, CPU).most == 4


def test_a_size_and_a_stage_may_be_asked_for_at_once() -> None:
    life = Life(limits_of(steps=60, autoscale=AutoscaleSpec(policy="available")))
    life.run_until(lambda: life.step == 5)
    life.target = DesiredRunState(seq=2, workers=2, stage="next", stage_requests=1, by_hand=True)
    life.tick()
    assert life.state.size_request is not None and life.state.size_request.by_hand
