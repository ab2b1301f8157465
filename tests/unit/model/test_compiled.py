"""Compiled parts of layers compute what eager ones compute, and code is not compiled again for other sizes."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from orchestrator.inference.int_model import use_integers
from orchestrator.model.attention.kv_cache import KVCache
from orchestrator.model.compiled import compile_parts, keep_code_apart
from orchestrator.model.factory import build_model, single_rank
from orchestrator.model.transformer import MoELanguageModel
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.quantization import QuantizationSpec

V = 61
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases and norms": {"qk_norm": True, "attention_bias": True, "partial_rotary_factor": 0.5},
    "latent": {"kv_lora_rank": 12, "q_lora_rank": 10, "rope_interleave": True, "v_head_dim": 10},
    "context": {"router": {"scorer": "context"}},
    "some recomputed": {"gradient_checkpointing": "selective"},
    "all recomputed": {"gradient_checkpointing": "full"},
}
SLOW = [pytest.param(form, marks=pytest.mark.slow) for form in FORMS if form != "plain"]  # each compiles for 20 s


def _model(**changes: Any) -> MoELanguageModel:
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "first_k_dense_replace": 2,
        "n_routed_experts": 4,
        "moe_intermediate_size": 16,
        "initializer_range": 0.2,
    }
    spec = ModelSpec.model_validate(sizes | changes)
    model = build_model(spec, V, single_rank(spec))
    assert isinstance(model, MoELanguageModel)
    model.init_weights(0)
    return model


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    torch.compiler.reset()


def _compiled(model: MoELanguageModel) -> MoELanguageModel:
    model = copy.deepcopy(model)
    compile_parts(model)
    return model


def _tokens(rows: int, length: int) -> Tensor:
    return torch.randint(0, V, (rows, length), generator=torch.Generator().manual_seed(rows * length))


def _gradients(model: MoELanguageModel, rows: int, length: int, lengths_B: Tensor | None = None) -> dict[str, Tensor]:
    model.zero_grad()
    tokens_BU = _tokens(rows, length + 1)
    loss = model(tokens_BU[:, :-1], tokens_BU[:, 1:].contiguous(), lengths_B=lengths_B)
    loss.backward()
    found = {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
    return {"loss": loss.detach(), **found}


def _assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys() and len(ours) > 10
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()) + 1e-30)


def _num_graphs() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("form", ["plain", *SLOW])
def test_losses_and_gradients_are_those_of_eager_layers(form: str) -> None:
    eager = _model(**FORMS[form])
    compiled = _compiled(eager)
    before = _num_graphs()
    _assert_close(_gradients(compiled, 2, 12), _gradients(eager, 2, 12))
    used = _num_graphs()
    assert used > before  # so parts were compiled
    for rows, length in ((2, 12), (5, 9), (3, 31), (0, 12)):
        _assert_close(_gradients(compiled, rows, length), _gradients(eager, rows, length))
    assert _num_graphs() == used  # for all sizes
    lengths_B = torch.tensor([9, 4, 7])
    _assert_close(_gradients(compiled, 3, 9, lengths_B), _gradients(eager, 3, 9, lengths_B))


@pytest.mark.parametrize("dtype", ["fp32", pytest.param("int8", marks=pytest.mark.slow)])
def test_tokens_one_by_one_have_the_logits_of_eager_layers(dtype: str) -> None:
    models = [_model().eval() for _ in range(2)]
    if dtype == "int8":
        for model in models:
            use_integers(model, QuantizationSpec())
    compile_parts(models[1])
    tokens_BT = _tokens(2, 7)
    found: list[list[Tensor]] = []
    for model in models:
        cache = KVCache(model.spec, 2, 16, torch.empty(0))
        found.append([model.extend(part_BT, cache) for part_BT in (tokens_BT, *tokens_BT.split(1, 1))])
    for ours, theirs in zip(found[1], found[0], strict=True):  # a value between two integers may become either
        assert float((ours - theirs).norm() / theirs.norm()) < (1e-5 if dtype == "fp32" else 0.05)


def test_a_machine_without_a_compiler_is_named_with_a_remedy() -> None:
    look = "import torch; from orchestrator.model.compiled import compiler_of; compiler_of(torch.device('cpu'))"
    environment = {"PATH": "/nowhere", "PYTHONPATH": ":".join(sys.path), "CXX": "no-such-compiler"}
    done = subprocess.run([sys.executable, "-c", look], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert (
        "can't be compiled on this node (train.torch_compile, --compile): no-such-compiler isn't there" in done.stderr
    )


def test_a_compiler_that_does_not_compile_is_named_with_a_remedy(tmp_path: Path) -> None:
    wrong = tmp_path / "g++"
    wrong.write_text('#!/bin/sh\necho broken\ntest "$1" = --version\n')
    wrong.chmod(0o755)
    look = "import torch; from orchestrator.model.compiled import try_compiler; try_compiler(torch.device('cpu'))"
    environment = os.environ | {"CXX": str(wrong), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    environment |= {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", look], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "UsageError: layers can't be compiled on this node" in done.stderr


def test_code_is_kept_apart_by_what_it_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/cache")
    keep_code_apart("g++ 12", 4, 128)
    first = os.environ["TORCHINDUCTOR_CACHE_DIR"]
    keep_code_apart("g++ 12", 4, 128)  # in a child
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == first and first.startswith("/cache/")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/cache")
    keep_code_apart("g++ 12", 2, 128)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] != first
