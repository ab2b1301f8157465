"""Low-rank adapters: the outputs and gradients of the merged matrices, beside one matrix or those of many experts."""

import pytest
import torch
from torch import Tensor, nn

from orchestrator.model.draws import draw_normal
from orchestrator.model.factory import build_model, single_rank
from orchestrator.model.linear.low_rank import LowRankAdapter
from orchestrator.model.moe.experts import GatedMLP, run_experts
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.pretrained.lora import LoraSpec

MLPS = LoraSpec(r=3, lora_alpha=6, target_modules=("gate_proj", "up_proj", "down_proj"))
COUNTS = (5, 0, 9, 3)


def _experts(dtype: torch.dtype = torch.float64) -> list[GatedMLP]:
    """Adapted experts with frozen matrices and random weights."""
    generator = torch.Generator().manual_seed(0)
    experts = [GatedMLP(16, 24) for _ in COUNTS]
    for expert in experts:
        expert.add_adapters(MLPS)
        expert.to(dtype)
        for name, param in expert.named_parameters():
            nn.init.normal_(param, generator=generator)
            param.requires_grad_(".lora." in f".{name}")
    return experts


def _merged(expert: GatedMLP, name: str) -> Tensor:
    """The matrix with its adapter, differentiable: each of the stacked ones has its own."""
    adapter, weight = expert.adapters[name], getattr(expert, name)
    rows, ranks = weight.shape[0] // adapter.blocks, adapter.A.shape[0] // adapter.blocks
    parts = [
        adapter.B[n * rows : (n + 1) * rows] @ adapter.A[n * ranks : (n + 1) * ranks] for n in range(adapter.blocks)
    ]
    return weight + adapter.scale * torch.cat(parts)


def test_a_stacked_matrix_has_an_adapter_for_each() -> None:
    (expert, *_) = _experts()
    assert [(name, tuple(p.shape)) for name, p in expert.named_parameters() if "lora" in name] == [
        ("lora.gate_up.A", (6, 16)),
        ("lora.gate_up.B", (48, 3)),
        ("lora.down.A", (3, 24)),
        ("lora.down.B", (16, 3)),
    ]
    x_NK = torch.randn(7, 16, dtype=torch.float64)
    for name, x in (("gate_up", x_NK), ("down", torch.randn(7, 24, dtype=torch.float64))):
        torch.testing.assert_close(expert.product(x, name), x @ _merged(expert, name).T)
        merged = expert.adapters[name].merged(getattr(expert, name))
        torch.testing.assert_close(merged, _merged(expert, name).float())


@pytest.mark.parametrize("with_gates", [True, False])
def test_experts_with_adapters_have_the_gradients_of_merged_ones(with_gates: bool) -> None:
    experts = _experts()
    generator = torch.Generator().manual_seed(1)
    x_ND = torch.randn(20, 16, dtype=torch.float64, generator=generator).requires_grad_()
    token_R = torch.randint(0, 20, (sum(COUNTS),), generator=generator)
    gates_R = torch.rand(sum(COUNTS), dtype=torch.float64, generator=generator).requires_grad_()
    y_ND = run_experts(x_ND, token_R, torch.tensor(COUNTS), experts, gates_R if with_gates else None)
    wanted_ND = torch.zeros_like(y_ND)
    for expert, tokens_C, gates_C in zip(experts, token_R.split(COUNTS), gates_R.split(COUNTS), strict=True):
        gate_CH, up_CH = (x_ND[tokens_C] @ _merged(expert, "gate_up").T).chunk(2, 1)
        inner_CH = nn.functional.silu(gate_CH) * up_CH * (gates_C[:, None] if with_gates else 1.0)
        wanted_ND = wanted_ND.index_add(0, tokens_C, inner_CH @ _merged(expert, "down").T)
    torch.testing.assert_close(y_ND, wanted_ND)
    trained = [p for expert in experts for p in expert.parameters() if p.requires_grad]
    inputs = [x_ND, *([gates_R] if with_gates else []), *trained]
    found = torch.autograd.grad(y_ND.square().sum(), inputs)
    wanted = torch.autograd.grad(wanted_ND.square().sum(), inputs, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(found, wanted)  # zeros, not None, of the expert without tokens


def test_adapters_begin_with_no_effect() -> None:
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "n_routed_experts": 4, "moe_intermediate_size": 16}
    lora = LoraSpec(target_modules=("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
    spec = ModelSpec(init_from="/base", lora=lora, **sizes)
    plain = build_model(spec.model_copy(update={"lora": None}), 50, single_rank(spec))
    adapted = build_model(spec, 50, single_rank(spec))
    plain.init_weights(0)
    adapted.init_weights(0)
    tokens_BT = torch.arange(40).view(2, 20)
    torch.testing.assert_close(adapted(tokens_BT), plain(tokens_BT), rtol=0, atol=0)
    adapters = [module for module in adapted.modules() if isinstance(module, LowRankAdapter)]
    assert len(adapters) == 2 * 2 + 2 * (1 + 4 + 1)
    for adapter in adapters:
        bound = adapter.A.shape[1] ** -0.5
        assert adapter.A.abs().max() <= bound and adapter.A.std() > bound / 3 and not adapter.B.any()
    before = [adapter.A.clone() for adapter in adapters]
    adapted.init_adapters(0)
    assert all(torch.equal(a, adapter.A) for a, adapter in zip(before, adapters, strict=True))
    adapted.init_adapters(1)
    assert not any(torch.equal(a, adapter.A) for a, adapter in zip(before, adapters, strict=True))


def test_dropout_leaves_out_inputs_in_training_alone() -> None:
    adapter = LowRankAdapter(8, 8, 2, 1.0, dropout=0.5)
    nn.init.normal_(adapter.A)
    nn.init.normal_(adapter.B)
    x_NK = torch.randn(4, 8)
    torch.manual_seed(0)
    assert not torch.equal(adapter(x_NK), adapter(x_NK))
    adapter.eval()
    assert torch.equal(adapter(x_NK), adapter(x_NK))


@pytest.mark.parametrize("recompute", ["selective", "sqrt", "full"])
def test_a_recomputed_pass_leaves_out_the_same_inputs(recompute: str) -> None:
    lora = LoraSpec(target_modules=("q_proj", "gate_proj", "up_proj", "down_proj"), lora_dropout=0.5)
    sizes = {"num_hidden_layers": 2, "first_k_dense_replace": 2, "hidden_size": 32, "intermediate_size": 48}
    tokens_BT, found = torch.arange(40).view(2, 20), []
    for kept in ("none", recompute):
        spec = ModelSpec(init_from="/base", lora=lora, gradient_checkpointing=kept, **sizes)
        model = build_model(spec, 50, single_rank(spec))
        model.init_weights(0)
        with torch.no_grad():
            for name, param in model.named_parameters():
                if name.endswith(".B"):
                    draw_normal(param, name, 0, 0.5)
        torch.manual_seed(0)
        model(tokens_BT, tokens_BT.roll(-1)).backward()
        found.append([param.grad for name, param in model.named_parameters() if ".lora." in name])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
