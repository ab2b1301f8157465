"""The keys of `model.router`: short form, and what is refused."""

from typing import Any

import pytest
from pydantic import ValidationError

from orchestrator.spec.job import JobSpec
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.moe.router import RouterSpec


def test_a_name_stands_for_a_scorer() -> None:
    short, long = (ModelSpec.model_validate({"router": value}) for value in ("attention", {"scorer": "attention"}))
    assert short.router == long.router == RouterSpec(scorer="attention")
    assert ModelSpec().router == RouterSpec() and not ModelSpec().has_gaps
    assert ModelSpec.model_validate_json(short.model_dump_json()).router == short.router


@pytest.mark.parametrize(
    ("model", "most", "has_gaps"),
    [
        ({}, 2, False),
        ({"router": {"selection": "top_p"}}, 4, True),
        ({"router": {"selection": "top_p"}, "n_routed_experts": 3}, 3, True),
        ({"router": {"selection": "top_p", "max_experts_per_tok": 5}}, 5, True),
        ({"router": {"capacity_factor": 1.25}}, 2, True),
        ({"router": {"selection": "expert_choice"}}, 8, True),
    ],
)
def test_experts_that_a_token_visits_at_most(model: dict[str, Any], most: int, has_gaps: bool) -> None:
    spec = ModelSpec.model_validate(model)
    assert (spec.max_experts_per_tok, spec.has_gaps) == (most, has_gaps)


def test_experts_that_choose_need_no_bias() -> None:
    assert ModelSpec.model_validate({"router": {"selection": "expert_choice"}}).bias_update_speed == 0.0


@pytest.mark.parametrize(
    ("model", "rule"),
    [
        ({"router": "softmax"}, "softmax is a value of model.scoring_func now"),
        (
            {"router": {"capacity_factor": 1.5}, "init_from": "there", "upcycle": True},
            "router.capacity_factor must not be 1.5 with upcycle: each token needs its experts",
        ),
        (
            {"router": {"selection": "expert_choice"}, "init_from": "there", "upcycle": True},
            "router.selection must not be expert_choice with upcycle",
        ),
        ({"router": {"rank": 8}}, "only attention and context read rank; got 8 for linear"),
        ({"router": {"scorer": "attention", "num_heads": 2}}, "only context reads num_heads; got 2 for attention"),
        ({"router": {"max_experts_per_tok": 3}}, "only top_p reads max_experts_per_tok; got 3 for top_k"),
        (
            {"router": {"selection": "expert_choice", "capacity_factor": 1.0}},
            "only top_k and top_p read capacity_factor; got 1.0 for expert_choice",
        ),
        (
            {"router": {"capacity_factor": 0.4}},
            "capacity_factor must be at least 0.5, or more is dropped than kept; got 0.4",
        ),
        (
            {"router": {"selection": "top_p"}, "num_experts_per_tok": 1},
            "num_experts_per_tok must be at least 2 and below the experts that a token visits at most; got 1 and 2",
        ),
        (
            {"router": {"selection": "top_p", "max_experts_per_tok": 2}},
            "below the experts that a token visits at most; got 2 and 2",
        ),
        (
            {"router": {"selection": "top_p", "max_experts_per_tok": 9}},
            "router.max_experts_per_tok must be at most n_routed_experts; got 9",
        ),
        ({"router": {"selection": "top_p"}, "n_group": 2}, "router.selection must be top_k with groups; got top_p"),
        (
            {"router": {"selection": "expert_choice"}, "bias_update_speed": 0.1},
            "bias_update_speed must be 0 with router.selection expert_choice, whose loads are equal; got 0.1",
        ),
        (
            {"router": "attention", "init_from": "there"},
            "router.scorer must be linear with init_from, whose routers are; got attention",
        ),
        (
            {"router": "attention", "impl": "transformers", "config": {"model_type": "dots1"}},
            "router is of our model; with impl: transformers, set it in config",
        ),
    ],
)
def test_settings_refused(model: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ModelSpec.model_validate(model)
    assert rule in str(caught.value)


def test_a_dense_model_may_begin_with_any_scorer() -> None:
    assert ModelSpec.model_validate({"router": "attention", "init_from": "there", "upcycle": True})


@pytest.mark.parametrize("router", [{"selection": "expert_choice"}, {"capacity_factor": 1.5}])
def test_a_choice_that_depends_on_other_rows_is_not_for_pairs(router: dict[str, Any]) -> None:
    asked = {"name": "try", "model": {"router": router}, "task": {"name": "dpo"}, "data": {"source": "pairs.jsonl"}}
    with pytest.raises(ValidationError, match="for pairs: a row's experts depend on other rows then"):
        JobSpec.model_validate(asked)
    assert JobSpec.model_validate(asked | {"model": {"router": {"selection": "top_p"}}})


def test_documents_that_are_isolated_choose_for_themselves() -> None:
    asked = {"name": "try", "data": {"isolate_documents": True}, "model": {"router": {"selection": "expert_choice"}}}
    with pytest.raises(ValidationError, match="expert_choice, which compares the tokens of all documents"):
        JobSpec.model_validate(asked)


def test_a_limit_on_ranks_is_for_a_fixed_number_of_experts() -> None:
    asked = {"name": "try", "model": {"router": {"selection": "top_p"}}, "communication": {"ranks_per_token": 1}}
    with pytest.raises(ValidationError, match="ranks_per_token limits the choice of top_k only"):
        JobSpec.model_validate(asked)
