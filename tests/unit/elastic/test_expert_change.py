"""Changes of the number of experts: families, sources, and two changes as one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.elastic.expert_change import ExpertChange, ExpertSet, cloned, kept, set_at


def test_clones_of_an_expert_are_a_family_through_every_growth() -> None:
    first = ExpertSet(2).after(ExpertChange(1, 2, cloned(2, 4)))
    assert first == ExpertSet(4, ((0, 1, 0, 1),))
    assert first.after(ExpertChange(2, 4, cloned(4, 8))) == ExpertSet(8, ((0, 1) * 4,))


def test_families_end_where_each_has_one_member_or_when_they_are_dissolved() -> None:
    grown = ExpertSet(2).after(ExpertChange(1, 2, cloned(2, 4)))
    assert grown.after(ExpertChange(2, 4, ((1, 2),))) == ExpertSet(2)
    assert grown.after(ExpertChange(2, 4, ((0, 2), (0, 1)))) == ExpertSet(2, ((0, 0), (0, 1)))
    assert grown.after(ExpertChange(2, 4, cloned(4, 4), dissolves=True)) == ExpertSet(4)


def test_the_experts_of_a_step_follow_from_all_changes_up_to_it() -> None:
    changes = (ExpertChange(10, 2, cloned(2, 4)), ExpertChange(20, 4, ((0, 1),)), ExpertChange(-1, 2, cloned(2, 8)))
    assert [set_at(2, changes, step).num_experts for step in (0, 9, 10, 19, 20, 99)] == [2, 2, 4, 4, 2, 2]


@pytest.mark.parametrize(("scores", "after", "sources"), [((1, 4, 2, 3), 2, (1, 3)), ((1, 1, 1, 1), 3, (0, 1, 2))])
def test_the_highest_scores_stay_in_their_order(scores: tuple[int, ...], after: int, sources: tuple[int, ...]) -> None:
    assert kept([scores], ExpertSet(4), after, 1) == (sources,)


@given(st.data())
def test_enough_families_stay_and_no_better_expert_is_left_out_for_another_of_its_family(data: st.DataObject) -> None:
    number, factor = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    experts = ExpertSet(number).after(ExpertChange(0, number, cloned(number, number * factor)))
    top_k = data.draw(st.integers(1, number))
    after = data.draw(st.integers(top_k, number * factor))
    scores = data.draw(st.lists(st.integers(0, 9), min_size=number * factor, max_size=number * factor))
    (stay,) = kept([scores], experts, after, top_k)
    family = [expert % number for expert in range(number * factor)]
    assert len(stay) == after and list(stay) == sorted({*stay}) and len({family[e] for e in stay}) >= top_k
    for left_out in {*range(number * factor)} - {*stay}:
        same = [scores[e] for e in stay if family[e] == family[left_out]]
        assert all(score >= scores[left_out] for score in same)
