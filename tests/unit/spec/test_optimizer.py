"""The optimizer's section: what each parameter gets, and what is refused."""

import pytest
from pydantic import ValidationError

from orchestrator.engine.optim.lr_schedule import learning_rate
from orchestrator.spec.optimizer import LrSchedulerSpec, OptimizerSpec, ParamSettings
from orchestrator.spec.train import TrainSpec


def _spec(**keys: object) -> OptimizerSpec:
    return OptimizerSpec.model_validate(keys)


@pytest.mark.parametrize(
    ("name", "shape", "decay"),
    [
        ("layers.0.attention.query", (8, 8), 0.1),
        ("layers.1.mlp.experts.3.gate_up", (8, 8), 0.1),
        ("head", (8, 8), 0.1),
        ("embedding.weight", (8, 8), 0.0),
        ("layers.1.mlp.router.scorer.weight", (4, 8), 0.0),
        ("layers.1.mlp.gate.weight", (4, 8), 0.0),
        ("layers.1.mlp.gate.wg.weight", (4, 8), 0.0),
        ("layers.1.mlp.gate_proj.weight", (8, 8), 0.1),
        ("layers.1.mlp.shared_expert_gate.weight", (1, 8), 0.1),
        ("model.tokens.weight", (8, 8), 0.0),
        ("model.head.weight", (8, 8), 0.1),
        ("layers.1.attention_norm.weight", (8,), 0.0),
        ("layers.1.attention.query_bias", (8,), 0.0),
    ],
)
def test_matrices_but_embeddings_and_routers_are_decayed(name: str, shape: tuple[int, ...], decay: float) -> None:
    assert _spec().settings_of(name, shape) == ParamSettings("adamw", 1.0, decay)
    assert _spec(groups=[{"params": ["*"], "weight_decay": 0.3}]).settings_of(name, shape).weight_decay == 0.3


def test_muon_leaves_to_adamw_what_is_no_matrix_of_a_layer() -> None:
    of = {
        name: _spec(name="muon").settings_of(name, shape).rule
        for name, shape in {
            "layers.0.attention.query": (8, 8),
            "layers.1.mlp.experts.3.down": (8, 8),
            "head": (9, 8),
            "model.lm_head.weight": (9, 8),
            "embedding.weight": (9, 8),
            "layers.1.mlp.router.scorer.weight": (4, 8),
            "layers.1.mlp.gate.weight": (4, 8),
            "layers.1.mlp.shared_experts.gate_proj.weight": (8, 8),
            "norm.weight": (8,),
        }.items()
    }
    assert [name for name, rule in of.items() if rule == "muon"] == [
        "layers.0.attention.query",
        "layers.1.mlp.experts.3.down",
        "layers.1.mlp.shared_experts.gate_proj.weight",
    ]
    assert set(of.values()) == {"muon", "adamw"}


def test_the_first_group_with_a_pattern_for_a_parameter_has_it() -> None:
    spec = _spec(groups=[{"params": ["a.*"], "lr_scale": 0.5}, {"params": ["*.x", "b"], "name": "lion"}])
    assert spec.settings_of("a.x", (8, 8)) == ParamSettings("adamw", 0.5, 0.1)
    assert spec.settings_of("b.x", (8, 8)) == ParamSettings("lion", 1.0, 0.1)
    assert spec.unmatched(["a.x", "b"]) == ["*.x"]
    assert spec.unmatched(["a.x", "b", "c.x"]) == []


@pytest.mark.parametrize(
    ("keys", "rule"),
    [
        ({"name": "sgd", "betas": [0.8, 0.9]}, "only adamw and lion and muon read betas; got"),
        ({"momentum": 0.5}, "only sgd and muon read momentum; got 0.5 for adamw"),
        ({"name": "adagrad"}, "Input should be"),
        ({"groups": [{"params": []}]}, "at least 1"),
        ({"groups": [{"params": ["*"], "lr_scale": 0}]}, "greater than 0"),
    ],
)
def test_what_a_rule_does_not_read_is_refused(keys: dict[str, object], rule: str) -> None:
    with pytest.raises(ValidationError, match=rule):
        _spec(**keys)
    assert _spec(name="adamw", groups=[{"params": ["*"], "name": "sgd"}], momentum=0.5).momentum == 0.5


def test_warmup_stable_decay_stays_and_then_falls() -> None:
    schedule = {"kind": "warmup_stable_decay", "warmup_steps": 4, "decay_steps": 5, "final_fraction": 0.2}
    train = TrainSpec(lr=1.0, max_steps=20, lr_scheduler=LrSchedulerSpec.model_validate(schedule))
    found = [learning_rate(train, step) for step in range(21)]
    assert found[:4] == [0.25, 0.5, 0.75, 1.0] and found[4:15] == [1.0] * 11
    assert found[15:20] == pytest.approx([0.84, 0.68, 0.52, 0.36, 0.2]) and found[20] == pytest.approx(0.2)
    of_tenth = TrainSpec(lr=1.0, max_steps=100, lr_scheduler=LrSchedulerSpec(kind="warmup_stable_decay"))
    assert learning_rate(of_tenth, 89) == 1.0 and learning_rate(of_tenth, 90) < 1.0


@pytest.mark.parametrize(
    "keys",
    [
        {"lr_scheduler": {"kind": "cosine", "decay_steps": 5}},
        {"max_steps": 8, "lr_scheduler": {"kind": "warmup_stable_decay", "warmup_steps": 4, "decay_steps": 5}},
        {"ema": {"decay": 1.0}},
    ],
)
def test_schedules_that_do_not_fit_are_refused(keys: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TrainSpec.model_validate(keys)
