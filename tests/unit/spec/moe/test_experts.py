"""The keys of `experts`: what is refused, by value, rule and key."""

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
