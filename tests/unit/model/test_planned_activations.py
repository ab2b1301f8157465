"""The formulas of `policy.activations` against what autograd saves."""

from typing import Any

import pytest
import torch
from torch import Tensor

from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.model.base import TokenScores
from orchestrator.model.loss import CrossEntropy
from orchestrator.model.moe.expert_parallel import ExpertParallelContext
from orchestrator.model.tasks.exit_losses import ExitLosses
from orchestrator.model.tasks.language_modeling import LanguageModeling
from orchestrator.model.transformer import MoELanguageModel
from orchestrator.policy.estimate.activations import activation_bytes, item_bytes, loss_bytes
from orchestrator.spec.exits import ExitsSpec
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.moe.router import RouterSpec
from orchestrator.spec.train import TrainSpec

VOCAB = 512
SIZES: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4}


def _saved_bytes(spec: ModelSpec, train: TrainSpec) -> int:
    """Distinct memory that the forward pass of a micro-batch keeps, without weights."""
    model = MoELanguageModel(
        spec, VOCAB, ExpertParallelContext(ExpertPlacement.balanced(spec.n_routed_experts, 1), 0, None)
    )
    model.init_weights(0)
    model = model.to(torch.bfloat16 if train.precision == "bf16" else torch.float32)
    weights = {param.untyped_storage().data_ptr() for param in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens = torch.randint(0, VOCAB, (train.micro_batch_rows, train.sequence_length))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if spec.exits is None:
            model(tokens, tokens)
        else:
            ExitLosses(LanguageModeling(), spec.exits).loss(model, {"inputs": tokens, "targets": tokens})
    return sum(tensor.untyped_storage().nbytes() for at, tensor in kept.items() if at not in weights)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"first_k_dense_replace": 4}, id="dense"),
        pytest.param({"first_k_dense_replace": 1}, id="experts"),
        pytest.param(
            {"n_routed_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 48}, id="many experts"
        ),
        pytest.param({"n_shared_experts": 0, "intermediate_size": 100}, id="nothing shared"),
        pytest.param({"num_attention_heads": 8, "num_key_value_heads": 8}, id="many heads"),
        pytest.param({"kv_lora_rank": 24, "q_lora_rank": 40}, id="latent attention"),
        pytest.param({"router": RouterSpec(scorer="attention", selection="top_p")}, id="a varying number of experts"),
        pytest.param({"router": RouterSpec(scorer="context")}, id="context"),
        pytest.param({"router": RouterSpec(scorer="context"), "n_routed_experts": 64}, id="context of many experts"),
        pytest.param({"router": RouterSpec(capacity_factor=1.0)}, id="a capacity"),
        pytest.param({"router": RouterSpec(selection="expert_choice")}, id="experts choose"),
        pytest.param({"exits": ExitsSpec(layers=(1, 3))}, id="exits"),
        pytest.param({"kv_lora_rank": 24, "rope_interleave": True, "v_head_dim": 16}, id="latent keys"),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_activations_that_a_micro_batch_keeps(changes: dict[str, Any], precision: str) -> None:
    spec = ModelSpec(**(SIZES | changes))
    train = TrainSpec(micro_batch_size=4, sequence_length=64, precision=precision)
    head_gradient = 4 * VOCAB * spec.hidden_size
    told = activation_bytes(spec, train, 0.0)
    assert _saved_bytes(spec, train) - head_gradient == pytest.approx(told, rel=0.03)


def test_recomputing_keeps_less() -> None:
    train = TrainSpec(micro_batch_size=4, sequence_length=64)
    deep = SIZES | {"num_hidden_layers": 16}
    told = [
        activation_bytes(ModelSpec(**deep, gradient_checkpointing=r), train, 0.0)
        for r in ("none", "selective", "sqrt", "full")
    ]
    assert told == sorted(told, reverse=True) and told[-1] < told[0] / 8


def test_the_loss_holds_a_chunk_of_logits() -> None:
    train = TrainSpec(micro_batch_size=8, sequence_length=1024)
    spec = ModelSpec(**SIZES)
    assert item_bytes(train) == 4
    assert loss_bytes(spec, train, 32_000) == 131 * 32_000 * 4 + 4 * 32_000 * 64


def test_a_chunk_of_logits_may_be_of_several_exits() -> None:
    """As many as the loss is called with, measured; and a copy of all hidden states, one after the other."""
    spec = ModelSpec(**SIZES, exits=ExitsSpec(layers=(1, 3)))
    train = TrainSpec(micro_batch_size=4, sequence_length=64)
    chunks: list[int] = []

    class Counting(CrossEntropy):
        def __call__(self, logits_CV: Tensor, here: slice, wants_gradient: bool) -> tuple[Tensor, Tensor | None]:
            chunks.append(len(logits_CV))
            return super().__call__(logits_CV, here, wants_gradient)

    states = [torch.randn(256, 64) for _ in range(3)]
    scores = TokenScores(states[0], torch.randn(VOCAB, 64), None, (states[1], states[2]))
    scores.joint_loss(Counting(torch.zeros(256, dtype=torch.int64)), (0.5, 0.5))
    assert sum(chunks) == 3 * 256
    assert loss_bytes(spec, train, VOCAB) == 3 * 256 * VOCAB * 4 + 4 * VOCAB * 64 + 3 * 256 * 64 * 4
