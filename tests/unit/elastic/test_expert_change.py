"""Changes of the number of experts: families, sources, and two changes as one."""

import pytest

from orchestrator.elastic.expert_change import ExpertChange, ExpertSet, cloned, kept, set_at


def test_clones_of_an_expert_are_a_family_through_every_growth() -> None:
    first = ExpertSet(2).after(ExpertChange(1, 2, cloned(2, 4)))
    assert first == ExpertSet(4, ((0, 1, 0, 1),))
    assert first.after(ExpertChange(2, 4, cloned(4, 8))) == ExpertSet(8, ((0, 1) * 4,))


def test_families_end_with_a_shrink_or_when_they_are_dissolved() -> None:
    grown = ExpertSet(2).after(ExpertChange(1, 2, cloned(2, 4)))
    assert grown.after(ExpertChange(2, 4, ((0, 2, 3),))) == ExpertSet(3)
    assert grown.after(ExpertChange(2, 4, cloned(4, 4), dissolves=True)) == ExpertSet(4)


def test_the_experts_of_a_step_follow_from_all_changes_up_to_it() -> None:
    changes = (ExpertChange(10, 2, cloned(2, 4)), ExpertChange(20, 4, ((0, 1),)), ExpertChange(-1, 2, cloned(2, 8)))
    assert [set_at(2, changes, step).num_experts for step in (0, 9, 10, 19, 20, 99)] == [2, 2, 4, 4, 2, 2]


@pytest.mark.parametrize(("scores", "after", "sources"), [((1, 4, 2, 3), 2, (1, 3)), ((1, 1, 1, 1), 3, (0, 1, 2))])
def test_the_highest_scores_stay_in_their_order(scores: tuple[int, ...], after: int, sources: tuple[int, ...]) -> None:
    assert kept([scores], after) == (sources,)


def test_each_layer_keeps_its_own_experts() -> None:
    assert kept([(1, 2, 3), (3, 2, 1)], 2) == ((1, 2), (0, 1))
    assert kept([(1, 2, 3), (0, 5, 5)], 2) == ((1, 2),)
