"""Models that transformers builds, with our experts, against transformers alone: weights, logits, gradients, files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from orchestrator.checkpoint.hf.pretrained import resolved
from orchestrator.elastic.state_spec import BUFFER, PARAM
from orchestrator.errors import CheckpointCorrupt, EntrypointError, UsageError
from orchestrator.inference.transformers_export import write_transformers
from orchestrator.model.base import TrainableModel
from orchestrator.model.factory import build_model, single_rank
from orchestrator.model.moe.routed_experts import Dispatched
from orchestrator.model.tasks.all_tasks import task_of
from orchestrator.model.transformers_impl.transformers_model import their_name
from orchestrator.model.trial.dry_run import rehearse
from orchestrator.spec.job import JobSpec
from orchestrator.spec.model import ModelSpec
from orchestrator.state.ranges import NamedRanges
from orchestrator.worker.transition.load_state import read_pretrained
from orchestrator.worker.transition.transformers_files import TransformersFiles

VOCAB, LENGTH = 96, 16
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
TWO_OF_FOUR = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
NAMED_OTHERWISE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
KINDS: dict[str, dict[str, Any]] = {
    "afmoe": NAMED_OTHERWISE | {"num_dense_layers": 1, "head_dim": 8},
    "deepseek_v2": TWO_OF_FOUR | LATENT | {"first_k_dense_replace": 1, "head_dim": 8, "n_group": 1, "topk_group": 1},
    "deepseek_v3": TWO_OF_FOUR | LATENT | {"first_k_dense_replace": 1, "n_group": 2, "topk_group": 1},
    "dots1": TWO_OF_FOUR | {"n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 8},
    "ernie4_5_moe": {
        "moe_intermediate_size": 16,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "head_dim": 8,
    },
    "exaone_moe": NAMED_OTHERWISE,
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "glm4_moe_lite": TWO_OF_FOUR | LATENT,
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 2.0},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 8},
    "jamba": {"num_experts": 4, "num_experts_per_tok": 2},
    "lfm2_moe": NAMED_OTHERWISE | {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "rotary_dim": 8},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": NAMED_OTHERWISE | {"shared_expert_intermediate_size": 24, "norm_topk_prob": True},
    "solar_open": TWO_OF_FOUR | {"head_dim": 8},
}


def _theirs(kind: str, directory: Path) -> Any:
    """A model of transformers with random weights, biases of routers among them, saved in the directory."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **KINDS[kind]})).eval()
    with torch.no_grad():
        for name, tensor in (*model.named_buffers(), *model.named_parameters()):
            if name.endswith(("e_score_correction_bias", "expert_bias")):
                tensor.uniform_(-0.1, 0.1)
    model.save_pretrained(directory)
    return model


def _ours(directory: Path, **keys: Any) -> TrainableModel:
    spec = resolved(ModelSpec(impl="transformers", init_from=str(directory), **keys), directory)
    model = build_model(spec, VOCAB, single_rank(spec))
    model.init_weights(0)
    ranges = NamedRanges()
    for name, param in model.named_parameters():
        ranges.add(f"{PARAM}/{name}", 0, param.data.view(-1))
    for name, buffer in model.state_buffers():
        ranges.add(f"{BUFFER}/{name}", 0, buffer.view(-1))
    read_pretrained(spec, ranges)
    return model.eval()


def _rows() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, VOCAB, (2, LENGTH + 1), generator=torch.Generator().manual_seed(3))
    return tokens[:, :-1], tokens[:, 1:]


def _reference_gradient(name: str, theirs: Any) -> torch.Tensor:
    their, expert = their_name(name)
    gradient: torch.Tensor = theirs.get_parameter(their).grad
    return gradient if expert is None else gradient[expert]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_equal_those_of_transformers_alone(tmp_path: Path, kind: str) -> None:
    theirs, (inputs_BT, targets_BT) = _theirs(kind, tmp_path), _rows()
    ours = _ours(tmp_path)
    logits = theirs(inputs_BT, use_cache=False).logits
    torch.testing.assert_close(ours(inputs_BT), logits, rtol=1e-5, atol=1e-6)
    loss = F.cross_entropy(logits.view(-1, VOCAB), targets_BT.reshape(-1), reduction="sum")
    loss.backward()
    mine = ours(inputs_BT, targets_BT)
    mine.backward()
    torch.testing.assert_close(mine, loss, rtol=1e-5, atol=0)
    for name, param in ours.named_parameters():
        wanted = _reference_gradient(name, theirs)
        assert param.grad is not None
        torch.testing.assert_close(param.grad, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()), msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_read_is_written_as_transformers_would_have(tmp_path: Path, kind: str) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    theirs = _theirs(kind, before)
    after.mkdir()
    num_bytes = write_transformers(_ours(before), VOCAB, LENGTH, "fp32", after)
    assert num_bytes == (after / "model.safetensors").stat().st_size
    old, new = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    again = AutoModelForCausalLM.from_pretrained(after).eval()
    inputs_BT, _ = _rows()
    assert torch.equal(again(inputs_BT, use_cache=False).logits, theirs(inputs_BT, use_cache=False).logits)


def test_an_export_in_bf16_keeps_in_fp32_what_transformers_does(tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    _theirs("dots1", before)
    after.mkdir()
    write_transformers(_ours(before), VOCAB, LENGTH, "bf16", after)
    tensors = load_file(after / "model.safetensors")
    whole = {name for name, tensor in tensors.items() if tensor.dtype is torch.float32}
    assert whole == {f"model.layers.1.mlp.gate.{name}" for name in ("weight", "e_score_correction_bias")}
    assert AutoModelForCausalLM.from_pretrained(after).dtype is torch.bfloat16


@pytest.mark.parametrize("kind", ["dots1", "qwen2_moe"])
def test_recomputed_activations_change_no_gradient(tmp_path: Path, kind: str) -> None:
    _theirs(kind, tmp_path)
    inputs_BT, targets_BT = _rows()
    gradients, calls = [], list[int]()
    for keys in ({}, {"gradient_checkpointing": "full"}):
        model = _ours(tmp_path, **keys).train()
        calls.append(0)
        model.moe_layers[0].register_forward_hook(lambda *_: calls.append(calls.pop() + 1))
        model.with_balance_losses(model(inputs_BT, targets_BT)).backward()  # type: ignore[no-untyped-call]
        gradients.append({name: param.grad for name, param in model.named_parameters()})
    assert calls == [1, 2]
    for name, gradient in gradients[0].items():
        assert gradient is not None and torch.equal(gradient, gradients[1][name]), name  # type: ignore[arg-type]


def test_a_recomputed_pass_keeps_the_choice_that_was_dispatched(tmp_path: Path) -> None:
    _theirs("qwen2_moe", tmp_path)
    layer = _ours(tmp_path).moe_layers[0]
    x_ND, ids_NK = torch.randn(5, 32), torch.tensor([[0, 3]] * 5)
    gates_NK = torch.rand(5, 2)
    once = layer(x_ND, ids_NK, gates_NK)
    layer._recomputed = lambda: Dispatched(ids_NK, None)  # type: ignore[method-assign]
    assert torch.equal(layer(x_ND, ids_NK.flip(1), gates_NK.flip(1)), once)


def test_padding_is_not_routed_and_changes_nothing_before_it(tmp_path: Path) -> None:
    _theirs("qwen2_moe", tmp_path)
    model, (inputs_BT, targets_BT) = _ours(tmp_path), _rows()
    lengths_B = torch.tensor([LENGTH, 5])
    losses_BT = model.token_losses(inputs_BT, targets_BT, lengths_B)
    assert int(model.moe_layers[0].last_counts_E.sum()) == 2 * (LENGTH + 5)
    torch.testing.assert_close(losses_BT[1, :5], model.token_losses(inputs_BT[1:, :5], targets_BT[1:, :5])[0])


def test_the_auxiliary_loss_is_that_of_transformers(tmp_path: Path) -> None:
    theirs, (inputs_BT, targets_BT) = _theirs("qwen2_moe", tmp_path), _rows()
    ours = _ours(tmp_path, router_aux_loss_coef=0.5).train()
    ours.with_balance_losses(ours(inputs_BT, targets_BT)).backward()  # type: ignore[no-untyped-call]
    theirs.train()
    output = theirs(inputs_BT, use_cache=False, output_router_logits=True)
    loss = F.cross_entropy(output.logits.view(-1, VOCAB), targets_BT.reshape(-1))
    (inputs_BT.numel() * (loss + 0.5 * output.aux_loss)).backward()
    for name, param in ours.named_parameters():
        wanted = _reference_gradient(name, theirs)
        assert param.grad is not None
        torch.testing.assert_close(param.grad, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()), msg=name)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda t: t.pop("model.layers.1.self_attn.q_proj.weight"), "lacks model.layers.1.self_attn.q_proj.weight"),
        (lambda t: t.pop("model.layers.0.mlp.experts.3.up_proj.weight"), "experts.experts.3.gate_up"),
        (lambda t: t.update({"model.layers.7.mlp.gate.weight": torch.zeros(4, 32)}), "model.layers.7.mlp.gate.weight"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(31)}),
            "doesn't match its config.json: model.norm.weight",
        ),
    ],
)
def test_files_of_another_model_are_named(tmp_path: Path, change: Any, fault: str) -> None:
    _theirs("qwen2_moe", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    spec = resolved(ModelSpec(impl="transformers", init_from=str(tmp_path)), tmp_path)
    with pytest.raises(CheckpointCorrupt) as caught:
        TransformersFiles(spec, tmp_path).check()
    assert fault in caught.value.message


def test_a_swapped_tensor_is_found(tmp_path: Path) -> None:
    theirs = _theirs("qwen2_moe", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    one, other = (f"model.layers.0.mlp.experts.{expert}.gate_proj.weight" for expert in (0, 1))
    tensors[one], tensors[other] = tensors[other], tensors[one]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    inputs_BT, _ = _rows()
    assert not torch.allclose(_ours(tmp_path)(inputs_BT), theirs(inputs_BT).logits, rtol=1e-3, atol=1e-4)


def _job(kind: str, **data: Any) -> JobSpec:
    model = resolved(ModelSpec(impl="transformers", config={"model_type": kind, **SIZES, **KINDS[kind]}))
    return JobSpec.model_validate(
        {"name": "r", "schema": "v1", "model": model, "data": data, "train": {"sequence_length": LENGTH}}
    )


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"afmoe", "jamba", "lfm2_moe"}))
def test_documents_of_a_row_do_not_see_each_other(kind: str) -> None:
    rehearse(_job(kind, isolate_documents=True), VOCAB, task_of(_job(kind).task), torch.device("cpu"))


@pytest.mark.parametrize(("kind", "why"), [("afmoe", "a document sees the one before it"), ("jamba", "layers of type")])
def test_models_that_mix_documents_are_refused(kind: str, why: str) -> None:
    with pytest.raises(EntrypointError) as caught:
        rehearse(_job(kind, isolate_documents=True), VOCAB, task_of(_job(kind).task), torch.device("cpu"))
    assert why in caught.value.message


@pytest.mark.parametrize("kind", ["dots1", "deepseek_v3", "glm4_moe_lite"])
def test_one_expert_per_token_can_be_tried_too(kind: str) -> None:
    config = {"model_type": kind, **SIZES, **KINDS[kind], "num_experts_per_tok": 1}
    config = {key: value for key, value in config.items() if key not in ("n_group", "topk_group")}
    if kind == "deepseek_v3":  # whose class has 8 groups
        config |= {"n_routed_experts": 16}
    model = resolved(ModelSpec(impl="transformers", config=config))
    job = _job(kind).model_copy(update={"model": model})
    rehearse(job, VOCAB, task_of(job.task), torch.device("cpu"))


def test_experts_that_compute_something_else_are_refused() -> None:
    config = {"model_type": "gpt_oss", **SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    spec = resolved(ModelSpec(impl="transformers", config=config))
    with pytest.raises(EntrypointError) as caught:
        build_model(spec, VOCAB, single_rank(spec))
    assert "GptOssExperts" in caught.value.message and "has_bias is True" in caught.value.message


def test_a_bias_speed_without_biases_is_refused() -> None:
    config = {"model_type": "qwen2_moe", **SIZES, **KINDS["qwen2_moe"]}
    spec = resolved(ModelSpec(impl="transformers", config=config, bias_update_speed=0.01))
    with pytest.raises(EntrypointError, match="bias_update_speed is 0.01, and routers of .* have no bias"):
        build_model(spec, VOCAB, single_rank(spec))


def test_what_transformers_cannot_build_is_refused(tmp_path: Path) -> None:
    config = {"model_type": "qwen2_mor", **SIZES, **NAMED_OTHERWISE}
    spec = resolved(ModelSpec(impl="transformers", config=config))
    with pytest.raises(EntrypointError) as caught:
        build_model(spec, VOCAB, single_rank(spec))
    assert "qwen2_mor" in caught.value.message
    config = {"model_type": "dots1", **SIZES, **TWO_OF_FOUR}  # without n_shared_experts
    spec = resolved(ModelSpec(impl="transformers", config=config))
    with pytest.raises(EntrypointError) as caught:
        build_model(spec, VOCAB, single_rank(spec))
    assert "can't build a model from the config of transformers (dots1): TypeError" in caught.value.message
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_moe", "hidden_size": 32}))
    with pytest.raises(UsageError) as refused:
        resolved(ModelSpec(impl="transformers", init_from=str(tmp_path)), tmp_path)
    assert "n_routed_experts or num_experts" in refused.value.message
