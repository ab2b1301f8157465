"""Models without units whose weights are zero: smaller, with the same logits."""

from typing import Any

import pytest
import torch

from orchestrator.inference.pruned_model import without_pruned_units
from orchestrator.model.factory import build_model, single_rank
from orchestrator.model.linear.products import LinearProducts
from orchestrator.model.transformer import MoELanguageModel
from orchestrator.spec.model import ModelSpec
from tests.support import devices

pytestmark = pytest.mark.usefixtures("device")

VOCAB = 50
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "n_routed_experts": 3, "initializer_range": 0.3}
LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4}


def _model(**keys: Any) -> MoELanguageModel:
    spec = ModelSpec.model_validate({"intermediate_size": 24, "moe_intermediate_size": 12, **SMALL, **keys})
    with devices.device():
        model = build_model(spec, VOCAB, single_rank(spec))
    assert isinstance(model, MoELanguageModel)
    model.init_weights(3)
    return model


@torch.no_grad()
def _emptied(model: MoELanguageModel, share: float) -> MoELanguageModel:
    """The model with this share of each module's units zero, others in each, and biases of all left as they are."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        for structure in module.structures() if isinstance(module, LinearProducts) else ():
            count = structure.multiple * int(share * structure.num_units / structure.multiple)
            units = torch.randperm(structure.num_units, generator=generator)[:count].to(devices.device())
            for part in structure.parts:
                part.by_unit(getattr(module, part.name), structure.num_units)[:, units] = 0.0
            for bias in structure.biases:
                getattr(module, bias.name).normal_()
    return model.eval()


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param({"attention_bias": True, "qk_norm": True}, id="grouped heads with biases"),
        pytest.param(LATENT, id="latent attention"),
        pytest.param({**LATENT, "q_lora_rank": 16}, id="latent queries too"),
        pytest.param({"n_shared_experts": 2, "intermediate_size": 12}, id="MLPs and experts of one width"),
        pytest.param({"n_shared_experts": 0, "first_k_dense_replace": 0}, id="experts alone"),
    ],
)
def test_a_smaller_model_has_the_same_logits(keys: dict[str, Any]) -> None:
    model = _emptied(_model(**keys), 0.5)
    smaller = without_pruned_units(model, single_rank(model.spec))
    before, after = model.spec, smaller.spec
    assert after.moe_intermediate_size == before.moe_intermediate_size // 2
    assert after.num_attention_heads == before.num_attention_heads // 2
    assert after.num_key_value_heads == before.num_key_value_heads // 2
    assert ModelSpec.model_validate(after.model_dump()) == after
    tokens = torch.randint(0, VOCAB, (2, 9), device=devices.device())
    with torch.no_grad():
        torch.testing.assert_close(smaller(tokens), model(tokens), rtol=1e-4, atol=1e-4)


def test_as_many_leave_each_module_as_are_empty_in_all() -> None:
    model = _emptied(_model(), 0.5)
    with torch.no_grad():
        model.layers[1].mlp.experts["0"].down.fill_(1.0)  # none of its neurons is empty
    smaller = without_pruned_units(model, single_rank(model.spec))
    assert smaller.spec.moe_intermediate_size == 12 and smaller.spec.intermediate_size == 12


def test_a_model_without_empty_units_stays_the_same() -> None:
    model = _model()
    assert without_pruned_units(model, single_rank(model.spec)) is model
