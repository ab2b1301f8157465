"""Which stage begins when, as far as the job and its corpus say."""

from typing import Any

import numpy as np
import pytest

from orchestrator.errors import DataError
from orchestrator.policy.curriculum import is_the_same_before, longest_row, planned_stages
from orchestrator.protocol.messages import StageStart
from orchestrator.sampling.chunks import Chunks
from orchestrator.spec.curriculum import CurriculumSpec
from orchestrator.spec.job import TrainSpec

TRAIN = TrainSpec(steps=50, global_batch_size=4, micro_batch_size=2, sequence_length=5)
CHUNKS = Chunks.of(np.full(100, 4), np.arange(100.0), 4)  # 400 tokens: 20 steps of 20


def _spec(*stages: dict[str, Any], **rest: Any) -> CurriculumSpec:
    return CurriculumSpec.model_validate({"stages": tuple(stages), **rest})


def _firsts(spec: CurriculumSpec, train: TrainSpec = TRAIN) -> list[tuple[str, int, int]]:
    return [(s.name, s.first_step, s.sequence_length) for s in planned_stages(spec, train, CHUNKS).stages]


def test_stages_follow_one_another_by_steps_and_by_tokens() -> None:
    spec = _spec(
        {"name": "a", "until": {"steps": 7}},
        {"name": "b", "sequence_length": 10, "until": {"tokens": 90}},  # 40 a step
        {"name": "c"},
    )
    assert _firsts(spec) == [("a", 0, 5), ("b", 7, 10), ("c", 10, 5)]
    assert longest_row(spec, TRAIN) == 10


def test_stages_after_the_last_step_are_not_reached() -> None:
    spec = _spec({"name": "a", "until": {"steps": 50}}, {"name": "b", "until": {"steps": 1}}, {"name": "c"})
    assert _firsts(spec) == [("a", 0, 5)]


def test_a_stage_with_nothing_left_gives_way_if_it_shall() -> None:
    easy = {"name": "a", "difficulty": (0.0, 0.5), "until": {"steps": 30}}  # 200 tokens: 10 steps
    assert _firsts(_spec(easy, {"name": "b"}, on_exhausted="next")) == [("a", 0, 5), ("b", 10, 5)]
    assert _firsts(_spec(easy, {"name": "b"}, on_exhausted="relax")) == [("a", 0, 5), ("b", 30, 5)]
    with pytest.raises(DataError, match="stage a admits too little: after 10 of its 30 steps"):
        planned_stages(_spec(easy, {"name": "b"}, on_exhausted="fail"), TRAIN, CHUNKS)


def test_a_stage_that_opens_is_exhausted_by_what_is_open() -> None:
    """A tenth is open for two of ten steps: 40 tokens are 2 steps, and then 80 in all are 4, as fast as it opens."""
    pace = {"kind": "step", "start": 0.1, "steps": 40, "jumps": 1}
    spec = _spec({"name": "a", "pace": pace, "until": {"steps": 40}}, {"name": "b"}, on_exhausted="next")
    assert _firsts(spec) == [("a", 0, 5), ("b", 2, 5)]


def test_the_last_stage_has_to_last_if_it_shall_fail_else() -> None:
    spec = _spec({"name": "a", "difficulty": (0.0, 0.5)}, on_exhausted="fail")
    assert _firsts(spec, TRAIN.model_copy(update={"steps": 10})) == [("a", 0, 5)]
    with pytest.raises(DataError, match="stage a admits too little: after 10 of its 11 steps"):
        planned_stages(spec, TRAIN.model_copy(update={"steps": 11}), CHUNKS)
    assert _firsts(_spec({"name": "a", "difficulty": (0.0, 0.5)}, on_exhausted="next")) == [("a", 0, 5)]


def test_a_stage_that_selects_nothing_is_named() -> None:
    few = Chunks.of(np.array([10, 10]), np.array([1.0, 2.0]), 4)
    spec = _spec({"name": "a", "until": {"steps": 1}}, {"name": "narrow", "difficulty": (0.1, 0.4)})
    with pytest.raises(DataError, match="stage narrow selects nothing"):
        planned_stages(spec, TRAIN, few)


STAGES = (
    {"name": "a", "until": {"steps": 10}},
    {"name": "b", "until": {"steps": 5}},
    {"name": "c", "sequence_length": 3},
)


def _decided(*stages: tuple[str, int]) -> list[tuple[str, int]]:
    found = planned_stages(_spec(*STAGES), TRAIN, CHUNKS, [StageStart(*stage) for stage in stages]).stages
    return [(stage.name, stage.first_step) for stage in found]


def test_what_is_decided_comes_first_and_the_job_goes_on_behind_it() -> None:
    assert _decided() == [("a", 0), ("b", 10), ("c", 15)]
    assert _decided(("b", 4)) == [("a", 0), ("b", 4), ("c", 9)]
    assert _decided(("c", 4)) == [("a", 0), ("c", 4)]
    assert _decided(("a", 12)) == [("a", 0), ("b", 10), ("a", 12), ("b", 22), ("c", 27)]
    assert _decided(("b", 4), ("a", 9), ("c", 11)) == [("a", 0), ("b", 4), ("a", 9), ("c", 11)]


def test_a_decision_for_a_later_stage_waits_for_its_step() -> None:
    assert _decided(("a", 20)) == [("a", 0), ("b", 10), ("c", 15), ("a", 20), ("b", 30), ("c", 35)]
    assert _decided(("b", 70)) == [("a", 0), ("b", 10), ("c", 15)]  # after the last step


def test_a_decision_changes_nothing_before_its_step() -> None:
    old = planned_stages(_spec(*STAGES), TRAIN, CHUNKS)
    new = planned_stages(_spec(*STAGES), TRAIN, CHUNKS, [StageStart("c", 7)])
    assert is_the_same_before(old, new, 7) and not is_the_same_before(old, new, 8)


@pytest.mark.parametrize("stages", [(("b", 0),), (("b", 4), ("c", 4)), (("b", 4), ("c", 3))])
def test_decisions_that_do_not_follow_one_another_are_refused(stages: tuple[tuple[str, int], ...]) -> None:
    with pytest.raises(ValueError, match="begins no later"):
        _decided(*stages)
