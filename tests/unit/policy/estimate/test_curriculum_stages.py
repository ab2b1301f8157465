"""First steps of stages, as far as they follow from the job and its corpus."""

from typing import Any

import numpy as np
import pytest

from orchestrator.errors import DataError
from orchestrator.policy.estimate.curriculum_stages import continued, longest_row, planned_stages
from orchestrator.protocol.messages import StageStart
from orchestrator.sampling.chunks import Chunks
from orchestrator.sampling.curriculum import Curriculum, CurriculumState
from orchestrator.spec.curriculum import CurriculumSpec
from orchestrator.spec.train import TrainSpec

TRAIN = TrainSpec(max_steps=50, global_batch_size=4, micro_batch_size=2, sequence_length=5)
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
    assert _firsts(spec, TRAIN.model_copy(update={"max_steps": 10})) == [("a", 0, 5)]
    with pytest.raises(DataError, match="stage a admits too little: after 10 of its 11 steps"):
        planned_stages(spec, TRAIN.model_copy(update={"max_steps": 11}), CHUNKS)
    assert _firsts(_spec({"name": "a", "difficulty": (0.0, 0.5)}, on_exhausted="next")) == [("a", 0, 5)]


def test_a_stage_that_selects_nothing_is_named() -> None:
    few = Chunks.of(np.array([10, 10]), np.array([1.0, 2.0]), 4)
    spec = _spec({"name": "a", "until": {"steps": 1}}, {"name": "narrow", "difficulty": (0.1, 0.4)})
    with pytest.raises(DataError, match="stage narrow selects nothing at first"):
        planned_stages(spec, TRAIN, few)


STAGES = (
    {"name": "a", "until": {"steps": 10}},
    {"name": "b", "until": {"steps": 5}},
    {"name": "c", "sequence_length": 3},
)


def _decided(*stages: tuple[str, int]) -> list[tuple[str, int]]:
    found = planned_stages(_spec(*STAGES), TRAIN, CHUNKS, [StageStart(*stage) for stage in stages]).stages
    return [(stage.name, stage.first_step) for stage in found]


def test_decided_stages_come_first_and_the_jobs_follow() -> None:
    assert _decided() == [("a", 0), ("b", 10), ("c", 15)]
    assert _decided(("b", 4)) == [("a", 0), ("b", 4), ("c", 9)]
    assert _decided(("c", 4)) == [("a", 0), ("c", 4)]
    assert _decided(("a", 12)) == [("a", 0), ("b", 10), ("a", 12), ("b", 22), ("c", 27)]
    assert _decided(("b", 4), ("a", 9), ("c", 11)) == [("a", 0), ("b", 4), ("a", 9), ("c", 11)]


def test_a_decision_for_a_later_stage_waits_for_its_step() -> None:
    assert _decided(("a", 20)) == [("a", 0), ("b", 10), ("c", 15), ("a", 20), ("b", 30), ("c", 35)]
    assert _decided(("b", 70)) == [("a", 0), ("b", 10), ("c", 15)]  # after the last step


@pytest.mark.parametrize("stages", [(("b", 0),), (("b", 4), ("c", 4)), (("b", 4), ("c", 3))])
def test_a_decision_that_does_not_follow_the_one_before_is_left_out(stages: tuple[tuple[str, int], ...]) -> None:
    assert _decided(*stages) == (_decided(*stages[:1]) if len(stages) > 1 else _decided())


def test_a_decision_to_end_another_stage_than_the_present_one_is_left_out() -> None:
    def decided(after: str) -> list[str]:
        state = planned_stages(_spec(*STAGES), TRAIN, CHUNKS, [StageStart("c", 12, after)])
        return [f"{stage.name}{stage.first_step}" for stage in state.stages]

    assert decided("b") == decided("") == ["a0", "b10", "c12"]
    assert decided("a") == ["a0", "b10", "c15"]


def _continued(first_step: int, *decided: StageStart, present: tuple[StageStart, ...] = ()) -> list[str]:
    spec = _spec(*STAGES)
    before = planned_stages(spec, TRAIN, CHUNKS, present)
    after = continued(before, first_step, spec, TRAIN, CHUNKS, decided)
    begun = [stage for stage in before.stages if stage.first_step < first_step]
    assert list(after.stages[: len(begun)]) == begun
    return [f"{stage.name}{stage.first_step}" for stage in after.stages]


def test_decisions_about_past_steps_are_too_late() -> None:
    assert _continued(7, StageStart("c", 7)) == ["a0", "c7"]
    assert _continued(8, StageStart("c", 7)) == ["a0", "b10", "c15"]
    assert _continued(12, StageStart("b", 4), StageStart("c", 12)) == ["a0", "b10", "c12"]


def test_a_followed_stage_stays_after_directives_stop_naming_it() -> None:
    assert _continued(8, present=(StageStart("b", 4),)) == ["a0", "b4", "c9"]
    assert _continued(8, StageStart("a", 8), present=(StageStart("b", 4),)) == ["a0", "b4", "a8", "b18", "c23"]


def test_nothing_fails_for_want_of_text_once_something_was_decided() -> None:
    spec = _spec({"name": "a", "difficulty": (0.0, 0.5), "until": {"steps": 5}}, {"name": "b"}, on_exhausted="fail")
    present = planned_stages(spec, TRAIN.model_copy(update={"max_steps": 20}), CHUNKS)
    longer = continued(present, 3, spec, TRAIN, CHUNKS, [StageStart("a", 10)])
    assert [stage.name for stage in longer.stages] == ["a", "b", "a", "b"]


def test_a_stage_by_document_ends_with_the_step_in_which_it_has_its_tokens() -> None:
    """Documents of 4 and 8 tokens, four a step: 16 to 32."""
    chunks = Chunks.of(np.array([4, 8] * 50), np.arange(100.0), 8)
    spec = _spec({"name": "a", "until": {"tokens": 200}}, {"name": "b"})
    train = TRAIN.model_copy(update={"sequence_length": 8})
    state = planned_stages(spec, train, chunks, by_document=True)
    curriculum = Curriculum(chunks, state)
    end = state.stages[1].first_step
    taken = [curriculum.spans(step).num_tokens for step in range(end)]
    assert sum(taken[:-1]) < 200 <= sum(taken) and len(set(taken)) > 1
    assert CurriculumState.from_json(state.to_json()).by_document
