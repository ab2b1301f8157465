"""The keys of `experts`: what is refused, by value, rule and key."""

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from orchestrator.spec.job import JobSpec


@pytest.mark.parametrize(
    ("job", "rule"),
    [
        (
            {"experts": {"placement": {"num_redundant_experts": 17}}, "workers": "1..3"},
            "num_redundant_experts must be at most 16, with which each of 3 workers has all 8 experts; got 17",
        ),
        ({"experts": {"placement": {"num_redundant_experts": 1}}}, "must be at most 0"),
        (
            {"experts": {"placement": {"policy": "load"}}, "communication": {"ranks_per_token": 1}, "workers": 2},
            "placement.policy must not be load with communication.ranks_per_token, by which loads follow the "
            "placement; got 1",
        ),
        (
            {
                "experts": {"placement": {"num_redundant_experts": 2}},
                "communication": {"nodes_per_token": 1},
                "workers": 2,
            },
            "placement.num_redundant_experts must not be 2 with communication.nodes_per_token",
        ),
        ({"experts": {"placement": {"policy": "greedy"}}}, "Input should be 'manual' or 'load'"),
        ({"experts": {"placement": {"num_redundant_experts": -1}}}, "greater than or equal to 0"),
    ],
)
def test_placements_that_cannot_be_are_refused(job: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValidationError) as refused:
        JobSpec.model_validate({"schema": "v1", "name": "try", **job})
    assert rule in str(refused.value)


def test_a_placement_by_load_with_copies_is_accepted() -> None:
    placement = {"policy": "load", "num_redundant_experts": 16}
    job = JobSpec.model_validate(
        {"schema": "v1", "name": "try", "workers": "1..3", "experts": {"placement": placement}}
    )
    assert job.experts.placement.num_redundant_experts == 16
    assert job.model.moe_layers and job.model.moe_layers[0].startswith("layers.")


@pytest.mark.parametrize(
    ("job", "rule"),
    [
        ([{"at_step": 5, "num_experts": 12}], "num_experts can't be 12 after 8: a growth makes equally many clones"),
        ([{"at_step": 5, "num_experts": 1, "keep": "random"}], "can't be 1 after 8: each token visits 2 experts"),
        (
            [{"at_step": 5, "num_experts": 16}, {"at_step": 9, "num_experts": 24}],
            "num_experts can't be 24 after 16: a growth makes equally many clones of each expert",
        ),
        ([{"at_step": 60, "num_experts": 4}], "with keep reap, at_step must be 64 steps or more after the start"),
        (
            [{"at_step": 50, "num_experts": 16}, {"at_step": 100, "num_experts": 8, "keep": "load"}],
            "with keep load, at_step must be 64 steps or more after the start or the change before; got 100 after 50",
        ),
        (
            [{"at_step": 50, "num_experts": 16}, {"at_step": 50, "num_experts": 8, "keep": "random"}],
            "at_step must be greater than in the entry before; got 50 after 50",
        ),
        ([{"at_step": 900, "num_experts": 16}], "at_step must be less than train.max_steps; got 900 and 100"),
        ([{"at_step": 5, "num_experts": 16, "noise": 2}], "less than or equal to 1"),
    ],
)
def test_schedules_that_cannot_be_are_refused(job: list[dict[str, Any]], rule: str) -> None:
    with pytest.raises(ValidationError) as refused:
        _scheduled(job)
    assert rule in str(refused.value)


def _staged(*experts: dict[str, Any] | None, on_exhausted: str = "relax", **sections: Any) -> JobSpec:
    """A job with a stage of 80 steps for each of these; the last one lasts as long as the run."""
    stages: list[dict[str, Any]] = [{"name": f"s{i}", "experts": each} for i, each in enumerate(experts)]
    for stage in stages[:-1]:
        stage["until"] = {"steps": 80}
    curriculum = {"stages": stages, "on_exhausted": on_exhausted}
    return JobSpec.model_validate(
        {"schema": "v1", "name": "try", "curriculum": curriculum, "train": {"max_steps": 300}, **sections}
    )


def test_stages_change_the_number_at_their_first_steps() -> None:
    job = _staged(None, {"num_experts": 16, "noise": 0.1}, None, {"num_experts": 4})
    by_schedule = JobSpec.model_validate(
        {
            "schema": "v1",
            "name": "try",
            "train": {"max_steps": 300},
            "experts": {
                "schedule": [
                    {"at_step": 80, "num_experts": 16, "noise": 0.1},
                    {"at_step": 240, "num_experts": 4},
                ]
            },
        }
    )
    assert job.expert_schedule == by_schedule.expert_schedule
    assert job.measured_steps == by_schedule.measured_steps == (207,) and job.most_experts == 16


GROWTH = {"num_experts": 16}


@pytest.mark.parametrize(
    ("job", "rule"),
    [
        (lambda: _staged(GROWTH, None), "experts of s0, the first stage, are model.n_routed_experts: leave them out"),
        (lambda: _staged(None, GROWTH, on_exhausted="next"), "the stages before s1 must end by until.steps, and on_ex"),
        (
            lambda: _staged(None, GROWTH, experts={"schedule": [{"at_step": 5, "num_experts": 16}]}),
            "experts.schedule and stages with experts both decide the number of experts: leave one out",
        ),
        (lambda: _staged(None, {"num_experts": 12}), "num_experts can't be 12 after 8: a growth makes equally many"),
        (
            lambda: _staged(None, GROWTH, model={"router": {"capacity_factor": 1.5}}),
            "the number of experts must not change with model.router.capacity_factor",
        ),
        (
            lambda: _staged(None, GROWTH, train={"max_steps": 80}),
            "the stage's first step must be less than train.max_steps; got 80 and 80",
        ),
    ],
)
def test_stages_whose_experts_cannot_be_are_refused(job: Callable[[], JobSpec], rule: str) -> None:
    with pytest.raises(ValidationError) as refused:
        job()
    assert rule in str(refused.value)


def _scheduled(schedule: list[dict[str, Any]], **model: Any) -> JobSpec:
    sections = {"experts": {"schedule": schedule}, "model": model, "train": {"max_steps": 100}}
    return JobSpec.model_validate({"schema": "v1", "name": "try", **sections})


@pytest.mark.parametrize(
    ("model", "rule"),
    [
        ({"n_group": 2, "topk_group": 2}, "must not change with model.n_group"),
        ({"scoring_func": "softmax", "norm_topk_prob": False}, "must not change with model.norm_topk_prob"),
        ({"scoring_func": "softmax", "bias_update_speed": 0.1}, "must not change with model.bias_update_speed"),
        ({"router": {"selection": "top_p"}}, "must not change with model.router.selection: top_p counts clones"),
        ({"router": {"capacity_factor": 1.5}}, "must not change with model.router.capacity_factor"),
        ({"entrypoint": "mine:build"}, "must not change with model.entrypoint: routers of other models"),
    ],
)
def test_models_whose_experts_cannot_change_are_refused(model: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValidationError) as refused:
        _scheduled([{"at_step": 5, "num_experts": 16}], **model)
    assert rule in str(refused.value)


def test_a_choice_that_follows_the_placement_finds_no_clones() -> None:
    schedule = {"schedule": [{"at_step": 5, "num_experts": 16}]}
    with pytest.raises(ValidationError, match="must not change with communication.ranks_per_token"):
        JobSpec.model_validate(
            {"schema": "v1", "name": "try", "experts": schedule, "communication": {"ranks_per_token": 1}, "workers": 2}
        )


def test_what_a_schedule_needs_is_measured() -> None:
    growth, shrink = {"at_step": 10, "num_experts": 16}, {"at_step": 90, "num_experts": 4}
    assert _scheduled([growth, shrink]).measured_steps == (57,)
    assert not _scheduled([growth]).keeps_saliency and not _scheduled([{**shrink, "keep": "random"}]).keeps_saliency
    assert _scheduled([growth, shrink]).most_experts == 16
