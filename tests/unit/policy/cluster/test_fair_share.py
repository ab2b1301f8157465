"""How a cluster's places are divided among runs: which are admitted, shrunk or preempted, and that no run
starves."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.policy.cluster.autoscaling import claim_of
from orchestrator.policy.cluster.fair_share import AGE_S, PROTECTED_S, STARTING_S, divide, has, is_loose, rank_of
from orchestrator.policy.cluster.grants import FREED_S, FREEING_S, FairShare, new_grants
from orchestrator.protocol.scaling import UNLIMITED, Grant, ScalingView

CPU = {"CPU": 1.0}
NOW_S = 10_000.0


def _run(name: str, wanted: int = 4, least: int = 1, **changes: Any) -> ScalingView:
    """A run that trains, with all that it wants."""
    plain = ScalingView(name, "manual", CPU, wanted, least, max(wanted, least), is_steady=True)
    return replace(plain, **changes)


def _new(name: str, wanted: int = 4, least: int = 1, **changes: Any) -> ScalingView:
    """A run that was just submitted."""
    return _run(name, wanted, least, **({"grant": Grant(0), "queued_s": NOW_S, "submitted_s": NOW_S} | changes))


def _divide(
    runs: Sequence[ScalingView], free: float = 0.0, homes: Mapping[str, int] | None = None, now_s: float = NOW_S
) -> dict[str, FairShare]:
    """On one node, where every run that trains has its places unless `homes` differs."""
    held = {run.run_id: has(run) for run in runs} if homes is None else homes
    places = {run: ["n"] * count for run, count in held.items()}
    return divide(runs, {run.run_id: claim_of(run) for run in runs}, places, {"n": {"CPU": free}}, now_s)


def _granted(shares: Mapping[str, FairShare]) -> dict[str, int | None]:
    return {run: share.grant.workers for run, share in shares.items()}


def test_alone_a_run_gets_all_that_there_is() -> None:
    assert _divide([_new("a")], 4.0) == {"a": FairShare(4, Grant(None, "there is room for all 4"))}
    assert _divide([_new("a")], 3.0) == {"a": FairShare(3, Grant(3, "there is room for 3"))}
    assert _divide([_new("a", least=2)], 1.0)["a"].grant == Grant(
        0, "the cluster has room for at most 1 of its workers; it needs at least 2"
    )


def test_a_higher_priority_shrinks_a_lower_one_to_its_minimum_and_no_further() -> None:
    low = _run("low", least=2)
    shares = _divide([low, _new("high", wanted=2, priority=5)])
    assert _granted(shares) == {"low": 2, "high": None}
    assert shares["low"].grant.why == "there is room for 2; high of priority 5 comes first"
    shares = _divide([low, _new("high", wanted=8, priority=5)])
    assert _granted(shares) == {"low": 2, "high": 2}
    shrunk = [replace(low, grant=Grant(2)), _run("high", 2, priority=5)]
    assert _granted(_divide(shrunk)) == {"low": 2, "high": None}  # and so it stays
    assert _granted(_divide(shrunk[:1], 2.0)) == {"low": None}  # until the other one ends


def test_a_run_of_the_same_priority_waits() -> None:
    shares = _divide([_run("old"), _new("young")])
    assert _granted(shares) == {"old": None, "young": 0}
    assert shares["young"].grant.why == "there is no room for 1 worker"
    assert _granted(_divide([_run("old"), _new("young")], 1.0)) == {"old": None, "young": 1}


def test_unneeded_places_go_to_waiting_runs() -> None:
    """A run that finds its size has grown into free places."""
    old = _run("old", policy="available", most=8)
    assert _granted(_divide([old, _new("young", 2, 2)])) == {"old": 2, "young": None}
    assert _granted(_divide([replace(old, is_pinned=True), _new("young", 2, 2)])) == {"old": None, "young": 0}
    assert _granted(_divide([replace(old, priority=1), _new("young", 2, 2)])) == {"old": None, "young": 0}


def test_the_choice_of_preempted_runs() -> None:
    """Only where minimums leave no room, only lower ones, the lowest and youngest first, and as few as are enough."""
    runs = [
        _run("a", 2, 2, submitted_s=1.0),
        _run("b", 1, 1, submitted_s=2.0),
        _run("c", 2, 2, submitted_s=3.0, priority=1),
        _run("d", 1, 1, submitted_s=4.0, priority=9),
    ]
    shares = _divide([*runs, _new("e", 1, 1, priority=5)])
    assert _granted(shares) == {"a": None, "b": 0, "c": None, "d": None, "e": None}
    assert shares["b"].grant.why == "e of priority 5 needs its places"
    assert _granted(_divide([*runs, _new("e", 2, 2, priority=5)])) == {
        "a": 0,
        "b": None,
        "c": None,
        "d": None,
        "e": None,
    }
    assert _granted(_divide([*runs, _new("e", 4, 4, priority=5)])) == {"a": 0, "b": None, "c": 0, "d": None, "e": None}
    assert _granted(_divide([*runs, _new("e", 6, 6, priority=5)])) == {
        "a": None,
        "b": None,
        "c": None,
        "d": None,
        "e": 0,
    }


@pytest.mark.parametrize(("is_long", "granted"), [(False, {"low": None, "high": 0}), (True, {"low": 0, "high": None})])
def test_a_newly_admitted_run_is_not_preempted(is_long: bool, granted: dict[str, int | None]) -> None:
    """Nor who has not begun yet, unless that takes too long."""
    high = _new("high", 1, 1, priority=5)
    trains = _run("low", 1, 1, admitted_s=NOW_S - 500.0, begun_s=NOW_S - PROTECTED_S + (not is_long))
    starts = _run("low", 1, 1, admitted_s=NOW_S - STARTING_S + (not is_long), has_begun=False)
    assert _granted(_divide([trains, high])) == _granted(_divide([starts, high])) == granted


def test_the_first_in_the_queue_is_not_overtaken() -> None:
    """Nor does another run grow into places for which it waits, except on nodes that it can't use."""
    runs = [_run("old", 3, 1, grant=Grant(2)), _new("big", 4, 4), _new("small", 1, 1, submitted_s=NOW_S + 1)]
    shares = _divide(runs, 2.0)
    assert _granted(shares) == {"old": 2, "big": 0, "small": 0}
    assert shares["small"].grant.why == "there is no room for 1 worker; behind big in the queue"
    gpu = _new("big", 2, 2, request={"GPU": 1.0})
    places = {"old": ["n"] * 2}
    free = {"n": {"CPU": 2.0}, "m": {"CPU": 2.0, "GPU": 1.0}}
    claims = {"old": 3, "big": 2, "small": 1}
    shares = divide([runs[0], gpu, runs[2]], claims, places, free, NOW_S)
    assert _granted(shares) == {"old": None, "big": 0, "small": None}


def test_places_taken_from_a_lower_run_are_not_reserved_for_a_waiting_one() -> None:
    """One that has waited long comes first in the queue, but could not have preempted that run itself."""
    waits = _new("waits", 1, 1, queued_s=NOW_S - 11 * AGE_S)
    runs = [waits, _run("middle", 4, 4, priority=1), _new("high", 4, 4, priority=9)]
    assert _granted(_divide(runs)) == {"waits": 0, "middle": 0, "high": None}


def test_a_run_that_could_never_be_admitted_blocks_no_other() -> None:
    """A node has gone since it was submitted."""
    shares = _divide([_new("big", 5, 5), _new("small", 1, 1, submitted_s=NOW_S + 1)], 4.0)
    assert _granted(shares) == {"big": 0, "small": None}
    assert shares["big"].grant.why == "the cluster has room for at most 4 of its workers; it needs at least 5"


def test_a_preempted_run_knows_for_which_run() -> None:
    """Until it has done so, whatever else is true by then; and nobody waits behind it."""
    low, high = _run("low", 3, 3), _new("high", 3, 3, priority=5)
    out = _divide([low, high], 1.0)["low"].grant
    assert out.why == "high of priority 5 needs its places"
    stops = replace(low, grant=out, queued_s=NOW_S)
    starts = replace(high, grant=UNLIMITED, queued_s=None, admitted_s=NOW_S, has_begun=False)
    assert _divide([stops, starts], 1.0, {"low": 3, "high": 0})["low"].grant == out
    runs = [_run("v", 2, 2, submitted_s=1.0), _run("w", 2, 2, priority=9), _new("h", 2, 2, priority=5)]
    shares = _divide([*runs, _new("x", 1, 1, priority=1), _new("y", 1, 1)])
    assert shares["v"].grant.workers == 0 and "behind x in the queue" in shares["y"].grant.why


def test_unconcerned_runs_are_not_named() -> None:
    low, high = _run("low", 4, 1, grant=Grant(2)), _run("high", 2, 1, priority=5, request={"GPU": 1.0})
    homes = {"low": ["n"] * 2, "high": ["g"] * 2}
    shares = divide([low, high], {"low": 4, "high": 2}, homes, {"n": {"CPU": 0.0}, "g": {"GPU": 0.0}}, NOW_S)
    assert shares["low"].grant.why == "there is room for 2"
    waits = _divide([low, _new("big", 4, 4)], 2.0)
    assert waits["low"].grant.why == "there is room for 2; big waits for its place"


def test_a_run_of_higher_priority_grows_past_the_queue() -> None:
    runs = [_run("high", 4, 1, grant=Grant(2), priority=3), _new("big", 4, 4)]
    assert _granted(_divide(runs, 2.0)) == {"high": None, "big": 0}


def test_waiting_raises_the_rank() -> None:
    low = _new("low", 1, 1, queued_s=NOW_S - 6 * AGE_S)
    high = _run("high", 4, 1, priority=5)
    assert rank_of(low, NOW_S) == 6
    assert _granted(_divide([high, low])) == {"high": 3, "low": None}
    assert _granted(_divide([high, replace(low, queued_s=NOW_S - 5 * AGE_S)])) == {"high": None, "low": 0}
    let_in = replace(low, grant=UNLIMITED, queued_s=None, admitted_s=NOW_S)
    assert _granted(_divide([replace(high, grant=Grant(3)), let_in])) == {"high": 3, "low": None}  # it keeps its place


def test_a_lost_place_is_taken_from_the_lower_one() -> None:
    """A node went: of seven places five are left."""
    runs = [_run("low", 3, 1), _run("high", 4, 1, priority=5)]
    assert _granted(_divide(runs, 0.0, {"low": 3, "high": 2})) == {"low": 1, "high": None}


def test_the_oldest_workers_keep_their_places() -> None:
    """Whoever is let in gets the places of those that will leave."""
    low = _run("low", 3, 1)
    gpu = {"GPU": 1.0, "CPU": 1.0}
    claims = {"low": 3, "high": 1}
    free = {"a": {"GPU": 1.0}, "b": {"GPU": 1.0}}
    high = _new("high", 1, 1, priority=1, request=gpu)
    shares = divide([low, high], claims, {"low": ["a", "b", "b"]}, free, NOW_S)
    assert _granted(shares) == {"low": 2, "high": None}


# -- what runs are told ----------------------------------------------------------------------------------------------


def _new_grants(
    runs: Sequence[ScalingView], shares: Mapping[str, FairShare]
) -> list[tuple[str, int | None, float | None]]:
    return [(new.run_id, new.grant.workers, new.patience_s) for new in new_grants(runs, shares)]


def test_grants_that_shrink_come_before_those_that_grow() -> None:
    runs = [_new("high", 2, 2, priority=5), _run("low", 4, 1)]
    assert _new_grants(runs, _divide(runs)) == [("low", 2, 0.0), ("high", None, 0.0)]


def test_a_place_must_be_missing_for_a_while_unless_a_run_is_admitted() -> None:
    runs = [_run("low", 3, 1), _run("high", 4, 1, priority=5)]
    assert _new_grants(runs, _divide(runs, 0.0, {"low": 3, "high": 2})) == [("low", 1, FREED_S)]
    alone = [_run("low", 3, 1)]
    assert _new_grants(alone, _divide(alone, 0.0, {"low": 2})) == [("low", 2, FREED_S)]


def test_a_single_run_is_admitted_at_once() -> None:
    assert _new_grants([_new("a")], _divide([_new("a")], 4.0)) == [("a", None, None)]


def test_a_run_that_trains_waits_for_the_rest_of_the_places_that_another_run_frees() -> None:
    run = replace(_run("low", 4, 1), grant=Grant(2, "there is room for 2"))
    assert _new_grants([run], _divide([run], 1.0, {"low": 2})) == [("low", 3, FREEING_S)]
    assert _new_grants([run], _divide([run], 2.0, {"low": 2})) == [("low", None, None)]


def test_no_grant_is_repeated() -> None:
    """But what a run waits for, when that is something else."""
    waits = _new("b", 2, 2)
    runs = [_run("a", 2, 2), waits]
    shares = _divide(runs)
    assert _new_grants(runs, shares) == [("b", 0, 0.0)]
    assert _new_grants([runs[0], replace(waits, grant=shares["b"].grant)], shares) == []


# -- whatever the cluster and its runs are like ----------------------------------------------------------------------

NODES = ("n0", "n1", "n2")
REQUESTS = ({"CPU": 1.0}, {"CPU": 2.0}, {"CPU": 1.0, "GPU": 1.0})


@st.composite
def _clusters(
    draw: st.DrawFn, are_alike: bool = False
) -> tuple[list[ScalingView], dict[str, list[str]], dict[str, dict[str, float]]]:
    """Runs that train where they fit, runs that wait, and what is left. Args: whether all workers are alike."""
    free = {n: {"CPU": float(draw(st.integers(0, 6))), "GPU": float(draw(st.integers(0, 2)))} for n in NODES}
    runs: list[ScalingView] = []
    homes: dict[str, list[str]] = {}
    for number in range(draw(st.integers(1, 6))):
        least = draw(st.integers(1, 3))
        wanted = least + draw(st.integers(0, 3))
        request = draw(st.sampled_from(REQUESTS[:1] if are_alike else REQUESTS))
        policy = draw(st.sampled_from(["manual", "available"]))
        run = ScalingView(
            f"r{number}",
            policy,
            request,
            wanted,
            least,
            wanted + draw(st.integers(0, 2)),
            standby=draw(st.integers(0, 1)),
            is_steady=True,
            priority=draw(st.integers(0, 2)),
            submitted_s=float(number),
            admitted_s=draw(st.sampled_from([None, NOW_S - 1.0])),
        )
        places: list[str] = []
        for node in NODES:
            while len(places) < run.full and all(free[node].get(k, 0.0) >= v for k, v in request.items()):
                places.append(node)
                for name, amount in request.items():
                    free[node][name] -= amount
        if draw(st.booleans()) and len(places) >= least:
            homes[run.run_id] = places
            runs.append(replace(run, grant=Grant(len(places)) if len(places) < run.full else UNLIMITED))
            continue
        for node in places:
            for name, amount in request.items():
                free[node][name] += amount
        waited_s = draw(st.sampled_from([0.0, 1.5 * AGE_S]))
        runs.append(replace(run, grant=Grant(0), queued_s=NOW_S - waited_s, admitted_s=None))
    return runs, homes, free


def _shares_of(
    runs: Sequence[ScalingView], homes: Mapping[str, Sequence[str]], free: Mapping[str, Mapping[str, float]]
) -> dict[str, FairShare]:
    return divide(runs, {run.run_id: claim_of(run) for run in runs}, homes, free, NOW_S)


@settings(max_examples=300, deadline=None)
@given(_clusters())
def test_what_holds_in_any_cluster(
    cluster: tuple[list[ScalingView], dict[str, list[str]], dict[str, dict[str, float]]],
) -> None:
    runs, homes, free = cluster
    shares = _shares_of(runs, homes, free)
    total = {
        name: sum(node[name] for node in free.values())
        + sum(run.request.get(name, 0.0) * len(homes.get(run.run_id, ())) for run in runs)
        for name in ("CPU", "GPU")
    }
    for name, amount in total.items():  # nothing is given away twice
        assert sum(shares[r.run_id].places * r.request.get(name, 0.0) for r in runs) <= amount + 1e-6
    let_in = [run for run in runs if run.queued_s is not None and shares[run.run_id].places]
    for run in runs:
        share = shares[run.run_id]
        assert share.places <= claim_of(run)
        assert share.grant.workers in (None, 0) or share.grant.workers >= run.least  # its minimum together, or none
        if run.queued_s is not None:
            continue
        if share.places < run.least:  # preempted, and only for who is higher
            assert share.places == 0 and any(new.priority > run.priority for new in let_in)
            assert run.admitted_s is None
        lost = min(len(homes[run.run_id]), run.full) - share.places
        higher = any(other.priority > run.priority for other in runs)
        needed = any(rank_of(new, NOW_S) >= run.priority for new in let_in)
        if lost > 0:  # to somebody who comes first
            assert higher or (needed and (is_loose(run) or any(rank_of(n, NOW_S) > run.priority for n in let_in)))


@settings(max_examples=300, deadline=None)
@given(_clusters(are_alike=True))
def test_shares_of_runs_that_hold_their_grants_are_stable(
    cluster: tuple[list[ScalingView], dict[str, list[str]], dict[str, dict[str, float]]],
) -> None:
    """Once runs hold what they were granted, nothing changes any more: no place goes back and forth. With workers that
    are unlike, Ray may place one where only another one fits, and that one waits again."""
    runs, homes, free = cluster
    for _ in range(12):  # a run that finds its size grows in a step of its own, and Ray has its own way with places
        shares = _shares_of(runs, homes, free)
        runs = [_after(run, shares[run.run_id]) for run in runs]
        homes, free = _placed(runs, homes, free)
        runs = [replace(r, has_begun=r.has_begun or len(homes.get(r.run_id, ())) >= r.least) for r in runs]
    again = _shares_of(runs, homes, free)
    assert {r.run_id: again[r.run_id].places for r in runs} == {r.run_id: len(homes.get(r.run_id, ())) for r in runs}


def _after(run: ScalingView, share: FairShare) -> ScalingView:
    """The run when it has followed its grant; whoever was let in has been in for long."""
    if share.grant.workers == 0:
        since_s = NOW_S if run.queued_s is None else run.queued_s
        return replace(run, grant=share.grant, queued_s=since_s, has_begun=False)
    wanted = max(run.wanted, min(share.places - run.standby, run.most)) if is_loose(run) else run.wanted
    return replace(run, grant=share.grant, queued_s=None, admitted_s=None, wanted=wanted)


def _placed(
    runs: Sequence[ScalingView], homes: Mapping[str, Sequence[str]], free: Mapping[str, Mapping[str, float]]
) -> tuple[dict[str, list[str]], dict[str, dict[str, float]]]:
    """Where workers are once everybody holds what is granted: the oldest stay, and Ray finds places for the others."""
    left = {node: dict(amounts) for node, amounts in free.items()}
    new: dict[str, list[str]] = {}
    for run in runs:
        for number, node in enumerate(homes.get(run.run_id, ())):
            if number < has(run):
                new.setdefault(run.run_id, []).append(node)
                continue
            for name, amount in run.request.items():
                left[node][name] += amount
    for run in runs:
        held = new.setdefault(run.run_id, [])
        for node in NODES:
            while len(held) < has(run) and all(left[node].get(k, 0.0) + 1e-9 >= v for k, v in run.request.items()):
                held.append(node)
                for name, amount in run.request.items():
                    left[node][name] -= amount
    return new, left


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_run_starves(data: st.DataObject) -> None:
    """However many runs of a higher priority keep coming: a low one gets its turn, and keeps it long enough to work,
    however long runs take to start."""
    size, start_s = data.draw(st.integers(2, 4)), data.draw(st.sampled_from([0.0, 90.0]))
    now_s, number = 0.0, 0
    needs = {"low": data.draw(st.sampled_from([30.0, 300.0]))}  # seconds of work
    runs = {"low": _new("low", size, size, queued_s=0.0, submitted_s=0.0)}
    done: list[str] = []
    while "low" not in done:
        assert now_s < 40 * AGE_S, "the low run never gets done"
        while len(runs) < 4:  # there is always somebody else
            number += 1
            least = data.draw(st.integers(1, size))
            name, priority = f"r{number}", data.draw(st.integers(1, 9))
            runs[name] = _new(name, size, least, priority=priority, queued_s=now_s, submitted_s=now_s)
            needs[name] = data.draw(st.sampled_from([30.0, 120.0]))
        homes = {name: has(run) if run.queued_s is None else 0 for name, run in runs.items()}
        shares = _divide(list(runs.values()), size - sum(homes.values()), homes, now_s)
        for name, run in list(runs.items()):
            grant = shares[name].grant
            if grant.workers == 0:
                since_s = now_s if run.queued_s is None else run.queued_s
                runs[name] = replace(run, grant=grant, queued_s=since_s, admitted_s=None, begun_s=None, has_begun=False)
                continue
            let_in_s = now_s if run.queued_s is not None else run.admitted_s
            has_begun = let_in_s is not None and now_s - let_in_s >= start_s
            begun_s = run.begun_s if run.begun_s is not None or not has_begun else now_s
            runs[name] = replace(
                run, grant=grant, queued_s=None, admitted_s=let_in_s, begun_s=begun_s, has_begun=has_begun
            )
            needs[name] -= 30.0 * has_begun
            if needs[name] <= 0:
                done.append(name)
                del runs[name]
        now_s += 30.0


def test_an_admitted_run_without_its_places_waits_again() -> None:
    """Free places were counted, but not on one node: a run that has begun stays, another one leaves them to others."""
    free = {"n": {"CPU": 1.0}, "m": {"CPU": 1.0}}
    run = _run("a", 1, 1, request={"CPU": 2.0}, has_begun=False)
    for has_begun, granted in ((False, 0), (True, 1)):
        shares = divide([replace(run, has_begun=has_begun)], {"a": 1}, {}, free, NOW_S)
        assert _granted(shares) == {"a": granted}


def test_a_run_gets_no_place_on_a_node_that_it_avoids() -> None:
    run = _new("a", 2, 1, avoid=("n",))
    assert _granted(_divide([run], 4.0)) == {"a": 0}
    stays = _run("a", 3, 1, avoid=("n",))  # whoever lives there already may stay
    assert _granted(_divide([stays], 4.0, {"a": 2})) == {"a": 2}


@pytest.mark.parametrize(("wanted", "granted"), [(4, 3), (2, 2)])
def test_a_grant_is_a_ceiling(wanted: int, granted: int) -> None:
    assert Grant(3).of(wanted) == granted and UNLIMITED.of(wanted) == wanted
