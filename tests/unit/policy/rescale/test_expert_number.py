"""The number of experts changes at its steps, and at no others, whatever happens to workers."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.elastic.expert_change import ExpertSet
from orchestrator.errors import UsageError
from orchestrator.policy.lifecycle import explain, phase_of
from orchestrator.policy.rescale.expert_number import check_request
from orchestrator.protocol.messages import ExpertRequest
from orchestrator.protocol.status import RunPhase
from orchestrator.protocol.worker_phase import Phase
from orchestrator.spec.moe.experts import ScheduledExperts, measured_step
from orchestrator.spec.workers import ScheduledScale
from tests.unit.policy.imagined import Life, limits_of

LAYERS = ("layers.0.mlp", "layers.1.mlp")
GROWS, SHRINKS = 20, 100
SCHEDULE = (
    ScheduledExperts(at_step=GROWS, num_experts=24),
    ScheduledExperts(at_step=SHRINKS, num_experts=4, keep="reap"),
)
WANTED = [8] * GROWS + [24] * (SHRINKS - GROWS) + [4] * 20
# Mean norms by expert: those of the last experts of the first layer, and of the first ones of the second, are largest.
SALIENCY = (tuple((float(e), 1.0) for e in range(24)), tuple((10.0 - e / 3, 1.0) for e in range(24)))


def _life(
    schedule: tuple[ScheduledExperts, ...] = SCHEDULE,
    steps: int = 120,
    schedule_of_sizes: tuple[ScheduledScale, ...] = (),
    **changes: Any,
) -> Life:
    measured = (measured_step(SHRINKS),) if schedule is SCHEDULE else ()
    of_experts = {"expert_schedule": schedule, "measured_steps": measured, "keeps_saliency": bool(measured)}
    limits = limits_of(steps=steps, moe_layers=LAYERS, top_k=2, schedule=schedule_of_sizes, **{**of_experts, **changes})
    life = Life(limits, checkpoint_every=7)
    life.saliency = {measured_step(SHRINKS): SALIENCY}
    return life


def test_a_schedule_is_followed_at_its_steps_without_a_lost_one() -> None:
    life = _life()
    life.run_until(lambda: life.state.outcome is not None, 400)
    assert life.state.outcome is RunPhase.SUCCEEDED and life.experts_by == WANTED
    assert [change.experts for change in life.state.rescales] == [(8, 24), (24, 4)]
    assert [(event.step, event.after) for event in life.of_kind("experts_changed")] == [(19, 24), (99, 4)]
    growth, shrink = life.state.experts.decided
    assert growth.sources == (tuple(range(8)) * 3,)
    assert shrink.sources == ((20, 21, 22, 23), (0, 1, 2, 3))
    assert life.state.current is not None and not life.state.current.families


@settings(deadline=None, max_examples=60)
@given(
    deaths=st.lists(st.tuples(st.integers(0, 250), st.integers(0, 3)), max_size=6),
    sizes=st.lists(st.tuples(st.integers(0, 200), st.integers(1, 4)), max_size=4),
    standby=st.integers(0, 2),
)
def test_each_step_is_done_by_the_experts_of_the_schedule_whatever_happens(
    deaths: list[tuple[int, int]], sizes: list[tuple[int, int]], standby: int
) -> None:
    life = _life(standby=standby)
    for tick in range(700):
        if life.state.outcome is not None:
            break
        for at_tick, workers in sizes:
            if at_tick == tick:
                life.scale(workers)
        for at_tick, nth in deaths:
            alive = [w for w in life.state.worker_group if w not in life.lost]
            if at_tick == tick and life.state.current is not None and alive:
                life.kill(alive[nth % len(alive)])
        life.tick()
    assert life.state.outcome is RunPhase.SUCCEEDED, life.state.why
    assert life.experts_by == WANTED
    assert [change.first_step for change in life.state.experts.decided] == [GROWS, SHRINKS]


@pytest.mark.parametrize("at_step", [GROWS, SHRINKS])
@pytest.mark.parametrize("everyone", [True, False])
def test_a_change_whose_first_step_fails_is_not_made_again(at_step: int, everyone: bool) -> None:
    life = _life(standby=1)
    life.run_until(lambda: life.step == at_step - 1, 400)
    life.holds_still = True
    wanted = WANTED[at_step]
    life.run_until(lambda: life.state.current is not None and life.state.current.experts.num_experts == wanted)
    life.run_until(lambda: all(life.reports[w].phase is Phase.TRAINING for w in life.state.members))
    generation = life.state.current.generation if life.state.current else -1
    for worker in life.state.members if everyone else life.state.members[:1]:
        life.kill(worker)
    life.holds_still = False
    life.run_until(lambda: life.state.outcome is not None, 600)
    assert life.state.outcome is RunPhase.SUCCEEDED and life.experts_by == WANTED
    assert life.state.activated > generation


def test_a_size_that_is_scheduled_for_the_step_of_a_change_follows_it_once() -> None:
    sizes = (ScheduledScale(at_step=GROWS, workers=3), ScheduledScale(at_step=SHRINKS + 3, workers=1))
    life = _life(schedule_of_sizes=sizes)
    life.run_until(lambda: life.state.outcome is not None, 400)
    assert life.state.outcome is RunPhase.SUCCEEDED and life.experts_by == WANTED
    assert [change.experts for change in life.state.rescales if change.experts] == [(8, 24), (24, 4)]
    assert life.sizes[-1] == 1 and 3 in life.sizes


def test_a_request_at_the_step_of_a_scheduled_change_takes_its_place() -> None:
    life = _life((ScheduledExperts(at_step=30, num_experts=16), ScheduledExperts(at_step=60, num_experts=48)), steps=90)
    life.run_until(lambda: life.step == 18)
    life.set_experts(24)
    life.run_until(lambda: life.state.next is not None)
    life.frozen.update(life.state.members)  # it takes until the scheduled step to prepare
    for _ in range(9):
        life.tick()
    life.frozen.clear()
    life.run_until(lambda: life.state.outcome is not None, 300)
    assert life.state.outcome is RunPhase.SUCCEEDED and life.experts_by[-1] == 48


def test_a_request_of_a_run_that_went_back_replaces_later_changes() -> None:
    life = _life((), steps=70)
    life.checkpoint_every = 15  # so it goes back by more steps than a change is prepared before
    life.run_until(lambda: life.step == 24)
    life.set_experts(16)
    life.run_until(lambda: bool(life.of_kind("experts_changed")))
    for worker in life.state.members:  # only a checkpoint from before is left
        life.kill(worker)
    life.set_experts(24)
    life.run_until(lambda: life.state.outcome is not None, 400)
    assert life.state.outcome is RunPhase.SUCCEEDED and life.experts_by[-1] == 24
    assert [change.num_experts for change in life.state.experts.decided] == [24]


def test_a_second_request_follows_the_first() -> None:
    life = _life((), steps=80)
    life.run_until(lambda: life.step == 10)
    life.set_experts(16)
    life.run_until(lambda: life.state.next is not None)
    life.set_experts(32)
    life.run_until(lambda: life.state.outcome is not None, 300)
    assert [(e.after, e.request) for e in life.of_kind("experts_changed")] == [(16, 1), (32, 2)]


def test_a_shrink_waits_at_its_step_until_it_is_known_who_stays() -> None:
    life = _life()
    averages, life.saliency = life.saliency, {}
    life.run_until(lambda: life.step == SHRINKS - 12, 300)
    life.progress = replace(life.progress, watermark=measured_step(SHRINKS) - 1)
    published, life.pending = life.pending, {}
    for _ in range(30):
        life.tick()
        life.progress = replace(life.progress, watermark=measured_step(SHRINKS) - 1)
    assert life.step == SHRINKS - 1 and life.state.next is None
    assert "waits before step 100" in explain(life.limits, life.state, life.seen())
    worker = life.state.members[0]
    life.say(worker, saliency=(measured_step(SHRINKS), averages[measured_step(SHRINKS)]))
    life.run_until(lambda: life.state.next is not None)
    assert published is not None and life.state.experts.decided[-1].first_step == SHRINKS


def test_a_request_is_carried_out_once_and_repeated_at_its_step_by_a_run_that_goes_back() -> None:
    life = _life((), steps=60)
    life.run_until(lambda: life.step == 20)
    life.set_experts(16)
    life.run_until(lambda: bool(life.of_kind("experts_changed")))
    (event,) = life.of_kind("experts_changed")
    for worker in life.state.members:  # all of them: only a checkpoint from before is left
        life.kill(worker)
    life.run_until(lambda: life.state.outcome is not None, 400)
    assert life.state.outcome is RunPhase.SUCCEEDED
    assert life.experts_by == [8] * (event.step + 1) + [16] * (59 - event.step)
    assert event.request == 1 and life.state.experts.requests == 1


def test_a_request_before_a_scheduled_change_leaves_what_the_schedule_can_do() -> None:
    life = _life((ScheduledExperts(at_step=40, num_experts=16),), steps=60)
    life.run_until(lambda: life.step == 10)
    life.set_experts(16)
    life.run_until(lambda: life.state.outcome is not None, 300)
    assert life.experts_by[39] == life.experts_by[-1] == 16
    assert len(life.state.rescales) == 1


def test_families_last_until_they_are_dissolved() -> None:
    life = _life((ScheduledExperts(at_step=20, num_experts=16),), steps=60)
    life.run_until(lambda: life.step == 30)
    assert life.state.current is not None
    assert life.state.current.experts == ExpertSet(16, ((*range(8), *range(8)),))
    life.scale(3)
    life.run_until(lambda: len(life.state.members) == 3)
    assert life.state.current.families
    life.set_experts(16, dissolve=True)
    life.run_until(lambda: len(life.of_kind("experts_changed")) == 2)
    assert life.state.current.experts == ExpertSet(16)
    life.run_until(lambda: life.state.outcome is not None, 300)


def test_a_request_that_comes_too_late_is_answered() -> None:
    life = _life((), steps=30)
    life.run_until(lambda: life.step == 20)
    life.set_experts(8)
    life.run_until(lambda: bool(life.of_kind("experts_unchanged")))
    assert "it has 8 experts already" in life.of_kind("experts_unchanged")[0].why
    assert not life.state.rescales


@pytest.mark.parametrize(
    ("request_", "changes", "why"),
    [
        (ExpertRequest(0, 12), {}, "12 is no multiple of 8"),
        (ExpertRequest(0, 1), {}, "each token visits 2 experts"),
        (ExpertRequest(0, 8), {}, "it has 8"),
        (ExpertRequest(0, 16), {"fixes_experts": {"n_group": "groups would get other experts"}}, "has model.n_group"),
        (ExpertRequest(0, 16, keep="random"), {}, "its schedule has 24 from step 20 on, and a growth makes"),
        (ExpertRequest(0, 4, keep="reap"), {"expert_schedule": ()}, "how much each adds is not known yet of its 8"),
        (ExpertRequest(0, 4, keep="load"), {"expert_schedule": ()}, "how many tokens each gets is not known yet"),
        (ExpertRequest(0, 16), {"follows_placement": ("ranks_per_token",)}, "with communication.ranks_per_token a"),
        (
            ExpertRequest(0, 32),
            {"expert_schedule": (ScheduledExperts(at_step=90, num_experts=16),)},
            "its schedule would leave out some of them from step 90 on, by what isn't measured",
        ),
    ],
)
def test_numbers_that_cannot_be_are_refused(request_: ExpertRequest, changes: dict[str, Any], why: str) -> None:
    life = _life(**({"schedule": changes.pop("expert_schedule")} if "expert_schedule" in changes else {}), **changes)
    life.run_until(lambda: life.step == 5)
    seen = life.seen()
    with pytest.raises(UsageError, match=why) as refused:
        check_request(life.limits, life.state, seen, phase_of(life.state, seen), request_)
    assert refused.value.unchanged == "run continues unchanged." and refused.value.remedy


def test_a_run_that_does_not_train_refuses_another_number() -> None:
    life = _life()
    with pytest.raises(UsageError, match="it is starting, not training"):
        check_request(life.limits, life.state, life.seen(), RunPhase.STARTING, ExpertRequest(0, 16))
