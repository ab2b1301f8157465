"""Which stage begins when, as far as the job and its corpus say."""

from typing import Any

import numpy as np
import pytest

from orchestrator.errors import DataError
from orchestrator.policy.curriculum import longest_row, planned_stages
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
