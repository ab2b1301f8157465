"""When a stage is decided: by hand, by a validation loss, by a plateau, and again if it was missed."""

from dataclasses import replace
from typing import Any

import pytest

from orchestrator.errors import UsageError
from orchestrator.policy.curriculum import AHEAD, decide_stages, following
from orchestrator.policy.state.progress import Progress, absorb
from orchestrator.policy.state.run_parts import CurriculumDecisions
from orchestrator.policy.state.run_state import Observation, RunState
from orchestrator.protocol.changes import changed
from orchestrator.protocol.codec import to_plain
from orchestrator.protocol.messages import DesiredRunState, FinishMode, StageStart
from orchestrator.protocol.step_record import StepRecord
from orchestrator.spec.curriculum import CurriculumSpec
from tests.unit.policy.imagined import Life, limits_of, record

HEARD = 2  # steps of a second in which every member hears of it


def _limits(*ends: dict[str, Any]) -> Any:
    stages = [{"name": name, "until": end} for name, end in zip("abcd", ends, strict=False)]
    spec = CurriculumSpec.model_validate({"stages": (*stages, {"name": "last"})})
    return limits_of(steps=200, curriculum=spec)


def _trained(up_to: int, stages: dict[int, str], losses: dict[int, float] | None = None) -> Progress:
    records: list[StepRecord] = []
    for step in range(up_to + 1):
        stage = next(name for first, name in sorted(stages.items(), reverse=True) if first <= step)
        records.append(changed(record(step), stage=stage, validation_loss=(losses or {}).get(step)))
    return absorb(Progress(), records)


def _training(limits: Any) -> RunState:
    life = Life(limits)
    life.run_until(lambda: life.step == 2)
    return life.state


def _seen(progress: Progress, target: DesiredRunState) -> Observation:
    return Observation(term=1, now_s=100.0, target=target, progress=progress)


def _decide(limits: Any, state: RunState, progress: Progress) -> tuple[RunState, list[dict[str, Any]]]:
    decision = decide_stages(limits, state, _seen(progress, state.target))
    return decision.state, [to_plain(action) for action in decision.actions]  # type: ignore[union-attr]


def test_a_stage_that_is_asked_for_begins_some_steps_ahead_once() -> None:
    limits = _limits({"steps": 50}, {"steps": 50})
    state = _training(limits)
    state = replace(state, target=replace(state.target, seq=9, stage="last", stage_requests=1))
    progress = _trained(20, {0: "a"})
    decided, told = _decide(limits, state, progress)
    first_step = 21 + AHEAD + HEARD
    assert decided.curriculum.stages == (StageStart("last", first_step),) and decided.curriculum.version == 1
    assert [(t["stage"], t["first_step"]) for t in told] == [("last", first_step)]
    assert _decide(limits, decided, progress) == (decided, [])
    later = _trained(first_step + 3, {0: "a", first_step: "last"})
    assert _decide(limits, decided, later) == (decided, [])


def test_next_is_the_one_behind_the_present_one() -> None:
    limits = _limits({"steps": 50}, {"steps": 50})
    state = _training(limits)
    state = replace(state, target=replace(state.target, seq=9, stage="next", stage_requests=1))
    decided, _ = _decide(limits, state, _trained(20, {0: "a", 10: "b"}))
    assert [stage.name for stage in decided.curriculum.stages] == ["last"]
    at_the_end, told = _decide(limits, state, _trained(20, {0: "a", 10: "last"}))
    assert at_the_end.curriculum == CurriculumDecisions(requests=1)
    assert told == [{"stage": "last", "why": "last is the last stage"}]
    assert limits.curriculum is not None and following(limits.curriculum, "") == "b"


def test_a_request_for_the_present_stage_is_answered_with_an_event() -> None:
    limits = _limits({"steps": 50}, {"steps": 50})
    state = _training(limits)
    state = replace(state, target=replace(state.target, seq=9, stage="a", stage_requests=1))
    kept, told = _decide(limits, state, _trained(20, {0: "a"}))
    assert kept.curriculum.stages == () and told == [{"stage": "a", "why": "a is the present stage"}]


def test_a_request_waits_for_the_stage_that_is_decided() -> None:
    limits = _limits({"steps": 50}, {"steps": 50})
    state = replace(_training(limits), curriculum=CurriculumDecisions((StageStart("b", 30),), 1, 1))
    state = replace(state, target=replace(state.target, seq=9, stage="last", stage_requests=2))
    assert _decide(limits, state, _trained(20, {0: "a"})) == (state, [])
    decided, _ = _decide(limits, state, _trained(30, {0: "a", 30: "b"}))
    assert [stage.name for stage in decided.curriculum.stages] == ["b", "last"] and decided.curriculum.version == 2


def test_next_is_void_once_another_stage_has_come() -> None:
    limits = _limits({"steps": 25}, {"steps": 50})
    state = replace(_training(limits), curriculum=CurriculumDecisions((StageStart("b", 28, after="a"),), 1))
    assert _decide(limits, state, _trained(30, {0: "a", 25: "b"})) == (state, [])
    other = replace(state, curriculum=CurriculumDecisions((StageStart("last", 28, after="a"),), 1))
    assert _decide(limits, other, _trained(30, {0: "a", 25: "b"})) == (other, [])


def test_a_validation_loss_ends_a_stage_if_it_is_of_that_stage() -> None:
    limits = _limits({"steps": 5}, {"validation_below": 3.0, "max_steps": 100})
    state = _training(limits)
    assert _decide(limits, state, _trained(20, {0: "a", 5: "b"}, {4: 2.9, 9: 3.1, 19: 3.0}))[1] == []
    decided, told = _decide(limits, state, _trained(20, {0: "a", 5: "b"}, {4: 2.9, 9: 3.1, 19: 2.99}))
    assert [stage.name for stage in decided.curriculum.stages] == ["last"]
    assert told[0]["why"] == "the validation loss is 2.9900, below 3"


@pytest.mark.parametrize(
    ("losses", "ends"),
    [
        ({2: 3.0, 4: 2.9, 6: 2.8}, False),
        ({2: 3.0, 4: 2.99, 6: 2.995}, True),
        ({2: 3.0, 4: 2.99}, False),
        ({2: 3.0, 4: 3.2, 6: 2.9}, False),
    ],
)
def test_a_plateau_ends_a_stage(losses: dict[int, float], ends: bool) -> None:
    limits = _limits({"plateau": 2, "max_steps": 100})
    decided, _ = _decide(limits, _training(limits), _trained(8, {0: "a"}, losses))
    assert [stage.name for stage in decided.curriculum.stages] == (["last"] if ends else [])


def test_a_stage_that_did_not_begin_is_decided_again() -> None:
    limits = _limits({"validation_below": 3.0, "max_steps": 100})
    state = replace(_training(limits), curriculum=CurriculumDecisions((StageStart("last", 20),), 1))
    assert _decide(limits, state, _trained(19, {0: "a"}, {5: 2.0})) == (state, [])  # not known yet
    decided, told = _decide(limits, state, _trained(22, {0: "a"}, {5: 2.0}))
    assert decided.curriculum.stages == (StageStart("last", 23 + AHEAD + HEARD),) and decided.curriculum.version == 2
    assert told[0]["why"] == "it did not begin at 20"


def test_nothing_is_decided_for_a_run_that_ends_or_has_no_curriculum() -> None:
    limits = _limits({"validation_below": 3.0, "max_steps": 100})
    state, progress = _training(limits), _trained(20, {0: "a"}, {5: 2.0})
    ending = replace(state, target=replace(state.target, finish=FinishMode.PAUSE))
    assert _decide(limits, ending, progress) == (ending, [])
    assert _decide(limits_of(), state, progress) == (state, [])
    assert _decide(replace(limits, steps=23), state, progress)[0].curriculum.stages == ()  # too near the end


def test_stages_that_the_job_does_not_have_are_refused() -> None:
    _limits({"steps": 3}).check_stage("next")
    with pytest.raises(UsageError, match="its stages are a, last"):
        _limits({"steps": 3}).check_stage("b")
    with pytest.raises(UsageError, match="its job has no curriculum"):
        limits_of().check_stage("next")


def test_a_stage_of_a_run_whose_stages_change_its_experts_begins_at_its_step() -> None:
    experts = {"name": "last", "experts": {"num_experts": 16}}
    spec = CurriculumSpec.model_validate({"stages": ({"name": "a", "until": {"steps": 3}}, experts)})
    with pytest.raises(UsageError, match="change its number of experts, at steps that follow from its job"):
        limits_of(steps=200, curriculum=spec).check_stage("last")
