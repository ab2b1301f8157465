"""Each family of models against transformers: the same weights, logits and gradients, read and written."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from orchestrator.checkpoint.hf.export import export_hf
from orchestrator.checkpoint.hf.families import BY_ARCHITECTURE, FAMILIES, family_of_spec
from orchestrator.checkpoint.hf.pretrained import open_pretrained, resolved
from orchestrator.errors import CheckpointCorrupt, UsageError
from orchestrator.model.transformer import MoELanguageModel
from orchestrator.spec.job import JobSpec
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.moe.router import RouterSpec
from orchestrator.worker.whole_models.whole_model import starting_model
from tests.integration.test_glm4_moe import _checkpoint_of

VOCAB, LENGTH = 97, 24
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": LENGTH,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
VARIANTS: dict[str, dict[str, Any]] = {
    "Glm4MoeForCausalLM": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "head_dim": 12,
    },
    "DeepseekV3ForCausalLM": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "num_key_value_heads": 4,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": 20,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 10,
        "qk_rope_head_dim": 6,
        "v_head_dim": 14,
        "num_nextn_predict_layers": 0,
    },
    "Qwen3MoeForCausalLM": EXPERTS | {"head_dim": 16, "norm_topk_prob": True},
    "MixtralForCausalLM": {"num_local_experts": 8, "num_experts_per_tok": 3},
    "OlmoeForCausalLM": {"num_experts": 8, "num_experts_per_tok": 3},
    "LlamaForCausalLM": {"rope_theta": 5e5},
    "Qwen3ForCausalLM": {"head_dim": 16, "tie_word_embeddings": True},
    "Qwen2ForCausalLM": {"sliding_window": 32768, "use_sliding_window": False, "max_window_layers": 21},
}


def _saved(architecture: str, directory: Path, **changes: Any) -> Any:
    """Their model, with random weights, and its directory."""
    family = BY_ARCHITECTURE[architecture]
    config = AutoConfig.for_model(family.model_type, **(SIZES | VARIANTS[architecture] | changes))
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    with torch.no_grad():
        for name, param in theirs.named_parameters():
            if "norm" in name:
                param.add_(0.2 * torch.randn_like(param))
            else:
                param.normal_(0.0, 0.2)
    theirs.save_pretrained(directory)
    return theirs.eval()


def _read(directory: Path) -> MoELanguageModel:
    spec = resolved(ModelSpec(init_from=str(directory)), directory)
    open_pretrained(directory).check(spec)
    model = starting_model(JobSpec(name="read", model=spec), VOCAB, torch.device("cpu"))
    assert isinstance(model, MoELanguageModel)
    return model


@pytest.mark.parametrize("architecture", VARIANTS)
def test_logits_and_gradients_equal_transformers(tmp_path: Path, architecture: str) -> None:
    assert [*BY_ARCHITECTURE] and set(VARIANTS) == set(BY_ARCHITECTURE)
    theirs, family = _saved(architecture, tmp_path / "theirs"), BY_ARCHITECTURE[architecture]
    ours = _read(tmp_path / "theirs")
    tokens_BU = torch.randint(0, VOCAB, (2, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    inputs_BT, targets_BT = tokens_BU[:, :-1], tokens_BU[:, 1:].contiguous()
    their_logits = theirs(input_ids=inputs_BT).logits
    torch.testing.assert_close(ours(inputs_BT), their_logits, rtol=2e-5, atol=2e-5)

    ours(inputs_BT, targets_BT).backward()
    F.cross_entropy(their_logits.flatten(0, 1), targets_BT.flatten(), reduction="sum").backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    scale = {name: float(grad.abs().max()) for name, grad in gradients.items()}
    compared = set()
    for name, param in ours.named_parameters():
        assert param.grad is not None, name
        for their_name, part in family.renamed(name, param.grad.numpy(), 1.0):
            if theirs.config.tie_word_embeddings and name in ("head", "embedding.weight"):
                continue  # theirs is the sum of both of ours
            place, known = _place(gradients, their_name)
            compared.add(known)
            torch.testing.assert_close(
                torch.from_numpy(part), place, rtol=1e-4, atol=1e-5 * max(scale[known], 1e-3), msg=their_name
            )
    left = set(gradients) - compared - {"model.embed_tokens.weight"}
    assert not left, left


def _place(tensors: dict[str, torch.Tensor], name: str) -> tuple[torch.Tensor, str]:
    """The tensor of this name, or its part of one that stacks experts in memory, and the name of that."""
    if name in tensors:
        return tensors[name], name
    name = name.replace("block_sparse_moe", "mlp")  # in memory
    if name in tensors:
        return tensors[name], name
    path, _, tail = name.partition(".experts.")
    number, kind, _ = tail.split(".")
    kind = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.get(kind, kind)
    if kind == "down_proj":
        return tensors[f"{path}.experts.down_proj"][int(number)], f"{path}.experts.down_proj"
    both = tensors[f"{path}.experts.gate_up_proj"][int(number)]
    half = both.shape[0] // 2
    return both[:half] if kind == "gate_proj" else both[half:], f"{path}.experts.gate_up_proj"


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 4.0, "beta_slow": 0.5}
SCALED: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("LlamaForCausalLM", {"rope_type": "linear", "factor": 4.0}),
    "llama3": ("LlamaForCausalLM", LLAMA3 | {"original_max_position_embeddings": 12}),
    "llama3 of a mixture": ("MixtralForCausalLM", LLAMA3 | {"original_max_position_embeddings": 100}),
    "yarn": ("Qwen3ForCausalLM", YARN | {"original_max_position_embeddings": 16}),
    "yarn, a factor": ("Qwen3MoeForCausalLM", YARN | {"original_max_position_embeddings": 9, "attention_factor": 1.3}),
    "yarn of DeepSeek": (
        "DeepseekV3ForCausalLM",
        YARN | {"original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 0.7},
    ),
}


@pytest.mark.parametrize(("architecture", "scaling"), SCALED.values(), ids=SCALED)
def test_scaled_positions_are_those_of_transformers(
    store_dir: Path, tmp_path: Path, architecture: str, scaling: dict[str, Any]
) -> None:
    theirs = _saved(architecture, tmp_path / "theirs", rope_parameters={"rope_theta": 5e3, **scaling})
    ours = _read(tmp_path / "theirs")
    inputs_BT = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = theirs(input_ids=inputs_BT).logits
        torch.testing.assert_close(ours(inputs_BT), wanted, rtol=2e-5, atol=2e-5)
        plain = ours.spec.model_copy(update={"rope_scaling": None})
        ours.spec, spec = plain, ours.spec
        assert not torch.allclose(ours(inputs_BT), wanted, rtol=1e-2, atol=1e-2)
    job = JobSpec(
        name="run",
        model=spec.model_copy(update={"init_from": None}),
        train={"sequence_length": LENGTH},  # type: ignore[arg-type]
    )
    export_hf(
        _checkpoint_of(ours, tmp_path / "checkpoints"), job, store_dir / "tokenizer.json", tmp_path / "again", "fp32"
    )
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto", attn_implementation="eager")
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=inputs_BT).logits, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", VARIANTS)
def test_what_was_read_is_written_as_the_same_family(store_dir: Path, tmp_path: Path, architecture: str) -> None:
    theirs = _saved(architecture, tmp_path / "theirs")
    ours = _read(tmp_path / "theirs")
    assert family_of_spec(ours.spec).architecture == architecture
    tokenizer = store_dir / "tokenizer.json"
    spec = ours.spec.model_copy(update={"init_from": None})
    job = JobSpec(name="run", model=spec, train={"sequence_length": LENGTH})  # type: ignore[arg-type]
    export_hf(_checkpoint_of(ours, tmp_path / "checkpoints"), job, tokenizer, tmp_path / "again", "fp32")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto", attn_implementation="eager")
    assert type(again).__name__ == architecture
    inputs_BT = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted = theirs(input_ids=inputs_BT).logits
        torch.testing.assert_close(again(input_ids=inputs_BT).logits, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", VARIANTS)
def test_a_swapped_tensor_is_found(tmp_path: Path, architecture: str) -> None:
    """Of equal shapes: by logits; of others: when the directory is opened."""
    theirs = _saved(architecture, tmp_path / "theirs")
    path = tmp_path / "theirs" / "model.safetensors"
    tensors = load_file(path)
    first, second = "model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight"
    tensors[first], tensors[second] = tensors[second].clone(), tensors[first].clone()
    save_file(tensors, path, {"format": "pt"})
    inputs_BT = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        swapped = _read(tmp_path / "theirs")(inputs_BT)
        assert not torch.allclose(swapped, theirs(input_ids=inputs_BT).logits, rtol=1e-2, atol=1e-2)
    tensors[first] = torch.zeros(3, 3)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointCorrupt, match="input_layernorm.weight has"):
        _read(tmp_path / "theirs")


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "positions that scale with the length": (
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 5e5, "factor": 8.0}},
        'rope_type "dynamic"',
    ),
    "a window": ("MixtralForCausalLM", {"sliding_window": 4096}, "sliding_window 4096"),
    "clipped": ("OlmoeForCausalLM", {"clip_qkv": 8.0}, "clip_qkv 8.0"),
    "some layers dense": ("Qwen3MoeForCausalLM", {"mlp_only_layers": [0]}, r"mlp_only_layers \[0\]"),
    "biases": ("LlamaForCausalLM", {"attention_bias": True}, "attention_bias true"),
    "key-value heads that don't divide": ("LlamaForCausalLM", {"num_key_value_heads": 3}, "must divide"),
    "more experts per token than there are": ("MixtralForCausalLM", {"num_experts_per_tok": 9}, "must be at most"),
    "heads that don't divide": ("OlmoeForCausalLM", {"head_dim": 32}, "takes to be 12"),
    "an unknown one": (
        "LlamaForCausalLM",
        {"architectures": ["Qwen3NextForCausalLM"]},
        "Qwen3NextForCausalLM; those that can be read are .*; nearest: Qwen3ForCausalLM",
    ),
}


@pytest.mark.parametrize(("architecture", "changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_models_that_ours_cannot_express_are_refused(
    tmp_path: Path, architecture: str, changes: dict[str, Any], message: str
) -> None:
    _saved(architecture, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UsageError, match=message):
        resolved(ModelSpec(init_from=str(tmp_path)), tmp_path)


def test_a_model_that_no_family_can_express_is_not_exported() -> None:
    with pytest.raises(UsageError, match=r"Glm4MoeForCausalLM has no scoring_func \"softmax\".*n_shared_experts 1"):
        family_of_spec(ModelSpec(scoring_func="softmax"))
    assert len(FAMILIES) == len(BY_ARCHITECTURE) == 8
    with pytest.raises(UsageError, match=r"Glm4MoeForCausalLM has no qk_norm \"all_heads\""):
        family_of_spec(ModelSpec(qk_norm="all_heads"))
    wide = ModelSpec(
        scoring_func="softmax", n_shared_experts=0, qk_norm="all_heads", first_k_dense_replace=0, head_dim=64
    )
    with pytest.raises(UsageError, match="OlmoeForCausalLM has no head_dim 64"):
        family_of_spec(wide)


@pytest.mark.parametrize(
    ("router", "shown"),
    [
        ({"scorer": "context"}, '{"scorer": "context"}'),
        ({"selection": "top_p"}, '{"selection": "top_p"}'),
        ({"selection": "expert_choice"}, '{"selection": "expert_choice"}'),
    ],
)
def test_a_router_that_no_linear_one_equals_is_not_exported(router: dict[str, Any], shown: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"Glm4MoeForCausalLM has no router {shown}")):
        family_of_spec(ModelSpec(router=RouterSpec(**router)))
    for kept in (RouterSpec(capacity_factor=2.0), RouterSpec(scorer="attention", rank=3, capacity_factor=2.0)):
        assert family_of_spec(ModelSpec(router=kept)).model_type == "glm4_moe"


@pytest.mark.parametrize("router", ["sigmoid", "softmax"])
@pytest.mark.parametrize("architecture", [name for name in VARIANTS if BY_ARCHITECTURE[name].router is None])
def test_an_upcycled_model_begins_as_the_dense_one(tmp_path: Path, architecture: str, router: str) -> None:
    theirs, directory = _saved(architecture, tmp_path), tmp_path
    asked = {"init_from": str(directory), "upcycle": True, "n_routed_experts": 6, "scoring_func": router}
    spec = resolved(ModelSpec.model_validate(asked), directory)
    assert (spec.first_k_dense_replace, spec.moe_intermediate_size, spec.n_shared_experts) == (0, 40, 0)
    open_pretrained(directory).check(spec)
    ours = starting_model(JobSpec(name="read", model=spec), VOCAB, torch.device("cpu"))
    inputs_BT = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(ours(inputs_BT), theirs(input_ids=inputs_BT).logits, rtol=2e-5, atol=2e-5)
    weights = dict(ours.named_parameters())
    assert torch.equal(weights["layers.1.mlp.experts.0.down"], weights["layers.1.mlp.experts.5.down"])
    assert float(weights["layers.1.mlp.router.scorer.weight"].detach().std()) > 0


def test_a_mixture_is_not_upcycled(tmp_path: Path) -> None:
    _saved("MixtralForCausalLM", tmp_path)
    with pytest.raises(UsageError, match="it is a mixture already, and model.upcycle is for a dense model"):
        resolved(ModelSpec(init_from=str(tmp_path), upcycle=True), tmp_path)
