"""Adapters in peft's files: read, trained further and written, with the logits that peft computes."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from orchestrator.checkpoint.hf.adapters import export_peft, open_adapter
from orchestrator.checkpoint.hf.export import write_model
from orchestrator.checkpoint.hf.pretrained import open_pretrained, resolved
from orchestrator.elastic.state_spec import BUFFER, PARAM
from orchestrator.inference.load_model import load_model
from orchestrator.inference.process import merged
from orchestrator.model.base import TrainableModel
from orchestrator.model.factory import build_model, single_rank
from orchestrator.spec.job import JobSpec
from orchestrator.spec.model import ModelSpec
from orchestrator.state.pretrained_weights import read_weights
from orchestrator.state.ranges import NamedRanges
from tests.support.checkpoints import write_weights

pytestmark = pytest.mark.on_cpu

VOCAB = 97
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EVERYWHERE = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}


def _saved(directory: Path, kind: str) -> nn.Module:
    """A model with random weights, written by transformers."""
    if kind == "llama":
        model: nn.Module = LlamaForCausalLM(LlamaConfig(**SIZES))
    else:
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **EXPERTS))
    _draw(model, "")
    model.save_pretrained(directory)
    return model


@torch.no_grad()
def _draw(model: nn.Module, name: str) -> None:
    """Random values for the matrices of this name."""
    generator = torch.Generator().manual_seed(len(name))
    for param_name, param in model.named_parameters():
        if name in param_name and param.dim() > 1:
            param.normal_(0.0, 0.2, generator=generator)


def _spec(base: Path, modules: tuple[str, ...], adapter: Path | None = None) -> ModelSpec:
    lora = {"r": 3, "lora_alpha": 12, "target_modules": modules, "init_from": None if adapter is None else str(adapter)}
    return resolved(ModelSpec.model_validate({"init_from": str(base), "lora": lora}), base)


def _ranges(model: TrainableModel) -> NamedRanges:
    ranges = NamedRanges()
    for name, param in model.named_parameters():
        ranges.add(f"{PARAM}/{name}", 0, param.data.view(-1))
    for name, buffer in model.state_buffers():
        ranges.add(f"{BUFFER}/{name}", 0, buffer.view(-1))
    return ranges


@torch.no_grad()
def _logits(model: nn.Module, ours: bool = False) -> Tensor:
    tokens_BT = torch.randint(0, VOCAB, (2, 20), generator=torch.Generator().manual_seed(5))
    logits: Tensor = model(tokens_BT) if ours else model(input_ids=tokens_BT).logits
    return logits


@pytest.mark.parametrize(("kind", "modules"), [("llama", EVERYWHERE), ("qwen3_moe", ATTENTION)])
def test_an_adapter_of_peft_gives_the_same_logits_here(tmp_path: Path, kind: str, modules: tuple[str, ...]) -> None:
    base = _saved(tmp_path / "base", kind)
    theirs = get_peft_model(base, LoraConfig(r=3, lora_alpha=12, target_modules=list(modules), task_type="CAUSAL_LM"))
    _draw(theirs, "lora_")
    theirs.save_pretrained(tmp_path / "adapter")
    spec = _spec(tmp_path / "base", modules, tmp_path / "adapter")
    model = build_model(spec, VOCAB, single_rank(spec))
    adapter = open_adapter(spec)
    adapter.check(spec)
    read_weights(open_pretrained(tmp_path / "base"), _ranges(model))
    read_weights(adapter, _ranges(model))
    torch.testing.assert_close(_logits(model, ours=True), _logits(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_an_adapter_from_here_gives_the_same_logits_in_peft_and_merged(tmp_path: Path, kind: str) -> None:
    """Also those of experts, which peft fuses as it loads them."""
    _saved(tmp_path / "base", kind)
    spec = _spec(tmp_path / "base", EVERYWHERE)
    job = JobSpec(name="adapters", model=spec)
    model = build_model(spec, VOCAB, single_rank(spec))
    read_weights(open_pretrained(tmp_path / "base"), _ranges(model))
    _draw(model, ".lora.")
    adapters = {name: param.detach().numpy() for name, param in model.named_parameters() if ".lora." in name}
    checkpoint = write_weights(tmp_path / "checkpoints", adapters)
    export_peft(checkpoint, job, tmp_path / "peft")
    found = load_model(checkpoint, job, VOCAB)
    (tmp_path / "merged").mkdir()
    write_model(merged(found), job, VOCAB, "fp32", tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    plain = _logits(base)
    wanted = _logits(found, ours=True)
    assert (plain - wanted).abs().max() > 0.1
    in_peft = PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    torch.testing.assert_close(_logits(in_peft), wanted, rtol=1e-5, atol=1e-5)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(_logits(whole), wanted, rtol=1e-5, atol=1e-5)
