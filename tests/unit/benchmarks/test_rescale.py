"""How figures are taken from votes and logs."""

from dataclasses import replace

import pytest

from benchmarks.baselines.ray_train_elastic import growth
from benchmarks.harness import Interval
from benchmarks.rescale import effect_time, ratio_of, rel_gaps, transition_of
from benchmarks.support.product import Request
from benchmarks.support.trace import FinishedStep
from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.world import World
from orchestrator.protocol.messages import GenerationPlan, StoreAddress
from orchestrator.protocol.status import Rescale
from orchestrator.protocol.step_record import BatchRecord, StepRecord, StepTiming, UpdateRecord

PLAN = GenerationPlan(
    1, World(1, ("w0", "w1")), ExpertPlacement.balanced(2, 2), None, None, "1/1", StoreAddress("127.0.0.1", 1)
)
REQUEST = Request(asked_time=9.5, rescale=Rescale(1, 1, 2, 4, "asked for", moved_bytes=100, state_identical=True))


def vote(step: int, generation: int, vote_time: float, step_s: float = 1.0) -> StepRecord:
    return StepRecord(
        step=step,
        generation=generation,
        world_size=1 + generation,
        loss=1.0,
        batch=BatchRecord(tokens=8, first_position=0, num_positions=1),
        update=UpdateRecord(lr=1e-3, grad_norm=1.0, applied=True),
        timing=StepTiming(step_s, vote_time),
    )


def votes_with(first_new_step: int) -> list[StepRecord]:
    old = [vote(step, 0, 6.0 + step) for step in range(5)]  # the last one at 10 s
    return old + [vote(first_new_step + n, 1, 12.0 + 0.5 * n, step_s=0.5) for n in range(4)]


def test_a_stall_is_what_passes_between_votes_less_a_step_of_the_new_world() -> None:
    found = transition_of(REQUEST, votes_with(5), PLAN, least_bytes=90)
    assert found == {
        "from": 1,
        "to": 2,
        "stall_s": 1.5,
        "bytes_moved": 100,
        "bytes_minimum": 90,
        "steps_lost": 0,
        "state_identical": True,
    }


@pytest.mark.parametrize(("first_new_step", "lost"), [(5, 0), (3, 2), (7, 2)], ids=["none", "done again", "left out"])
def test_steps_done_again_or_left_out_are_lost(first_new_step: int, lost: int) -> None:
    assert transition_of(REQUEST, votes_with(first_new_step), PLAN, least_bytes=90)["steps_lost"] == lost


def test_a_state_that_was_not_compared_is_not_identical() -> None:
    unknown = replace(REQUEST, rescale=replace(REQUEST.rescale, state_identical=None))
    assert transition_of(unknown, votes_with(5), PLAN, least_bytes=90)["state_identical"] is False


def test_the_effect_of_a_request_is_the_first_vote_of_its_world() -> None:
    assert effect_time(votes_with(5), REQUEST) == 12.0


def test_loss_gaps_are_relative_and_need_every_step() -> None:
    assert rel_gaps({0: 2.0, 1: 4.0}, {0: 2.0, 1: 5.0}, 2) == pytest.approx([0.0, 0.2])
    with pytest.raises(KeyError):
        rel_gaps({0: 2.0}, {0: 2.0, 1: 5.0}, 2)


def test_the_ratio_is_as_uncertain_as_both_sides() -> None:
    assert ratio_of([6.0, 8.0, 10.0], Interval(0.4, 0.25, 0.5)) == Interval(20.0, 12.0, 40.0)


def test_growth_counts_from_the_first_step_never_done_before() -> None:
    old = [FinishedStep(step, 0, 1, 7, end_time=float(step), loss=1.0) for step in range(9)]
    new = [FinishedStep(5 + n, 0, 2, 8, end_time=14.0 + 0.5 * n, loss=1.0) for n in range(8)]
    found = growth(old + new)
    # Steps 5 to 8 are done again; step 9 ends at 16 s.
    assert found == {"stall_s": 16.0 - 8.0 - 0.5, "steps_replayed": 4, "step_s": 0.5, "restart_s": 14.0 - 8.0 - 0.5}


def test_no_growth_is_no_figure() -> None:
    with pytest.raises(ValueError, match="no growth was seen"):
        growth([FinishedStep(0, 0, 1, 7, end_time=0.0, loss=1.0)])
