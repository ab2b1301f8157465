"""Runs that begin with another's weights: real ranks read what transformers has saved, and give the same logits."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._C._distributed_c10d import Store
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

from orchestrator.checkpoint.hf.families import GLM4_MOE
from orchestrator.checkpoint.hf.pretrained import open_pretrained, resolved
from orchestrator.checkpoint.hf.shapes import shapes
from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.engine.deepspeed.engine import DeepSpeedEngineAdapter
from orchestrator.engine.process_groups import connect
from orchestrator.model.factory import catalogue
from orchestrator.model.moe.expert_parallel import ExpertParallelContext
from orchestrator.model.transformer import MoELanguageModel
from orchestrator.spec.communication import CommunicationSpec, CompressionSpec
from orchestrator.spec.model import ModelSpec
from orchestrator.worker.transition.load_state import read_pretrained
from tests.support import devices
from tests.support.ranks import Ranks
from tests.support.small import train_spec

pytestmark = pytest.mark.long_emulated

VOCAB, LENGTH = 97, 24
SPEC = ModelSpec(
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=80,
    n_routed_experts=5,
    num_experts_per_tok=3,
    moe_intermediate_size=24,
    attention_bias=True,
    qk_norm=True,
    partial_rotary_factor=0.5,
)


def _saved(directory: Path, dtype: torch.dtype, **changes: Any) -> Glm4MoeForCausalLM:
    """A random model, written by transformers."""
    config = Glm4MoeConfig(**(GLM4_MOE.configuration(SPEC, VOCAB, LENGTH, "float32") | changes))
    config._attn_implementation = "eager"
    model = Glm4MoeForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point() and tensor.dim() > 0 and tensor.numel() != SPEC.rotary_size // 2:
                tensor.normal_(0.0, 0.2, generator=generator)
    model.to(dtype).save_pretrained(directory, max_shard_size="100KB")
    return Glm4MoeForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")


def _stacked(directory: Path) -> None:
    """The same file with experts as they are stacked in memory."""
    (index,) = directory.glob("*.index.json")
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    index.unlink()
    for layer in range(SPEC.first_k_dense_replace, SPEC.num_hidden_layers):
        one = f"model.layers.{layer}.mlp.experts."
        matrices = [[tensors.pop(f"{one}{e}.{kind}_proj.weight") for kind in ("gate", "up", "down")] for e in range(5)]
        tensors[f"{one}gate_up_proj"] = torch.stack([torch.cat((gate, up)) for gate, up, _ in matrices])
        tensors[f"{one}down_proj"] = torch.stack([down for _, _, down in matrices])
    save_file(tensors, directory / "model.safetensors")


def _as_it_is(directory: Path) -> None:
    assert len(list(directory.glob("*.safetensors"))) > 1


def _begin(
    rank: int, world_size: int, store: Store, prefix: str, spec: ModelSpec, precision: str, inputs_BT: torch.Tensor
) -> tuple[torch.Tensor, dict[str, tuple[int, torch.Tensor]]]:
    """On a rank: logits after reading, and the ranges that it holds."""
    placement = ExpertPlacement.balanced(spec.n_routed_experts, world_size)
    groups = connect(store, prefix, rank, placement, devices.backend(), timeout_s=60)
    with devices.device():
        model = MoELanguageModel(spec, VOCAB, ExpertParallelContext(placement, rank, groups.exchange))
    communication = CommunicationSpec(compression=CompressionSpec(scheme="topk"))  # its residuals begin at zero
    engine = DeepSpeedEngineAdapter(model, train_spec(precision), groups, devices.device(), communication)
    engine.on_weights_initialized()
    read_pretrained(spec, engine.ranges())
    engine.on_state_loaded(0)
    held = {name: (part.start, part.data.detach().cpu()) for name, part in engine.ranges()}
    with torch.no_grad():
        return model(inputs_BT.to(devices.device())).cpu(), held


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("dtype", "changes", "rewrite"),
    [
        pytest.param(torch.float32, {}, _as_it_is, id="fp32"),
        pytest.param(torch.bfloat16, {}, _as_it_is, id="bf16"),
        pytest.param(torch.float16, {}, _stacked, id="fp16, experts stacked"),
        pytest.param(torch.float32, {"tie_word_embeddings": True}, _as_it_is, id="head tied to the embedding"),
    ],
)
def test_logits_equal_those_of_transformers_after_a_load(
    ranks: Ranks,
    tmp_path: Path,
    world_size: int,
    dtype: torch.dtype,
    changes: dict[str, Any],
    rewrite: Callable[[Path], None],
) -> None:
    theirs = _saved(tmp_path / "hf", dtype, **changes)
    rewrite(tmp_path / "hf")
    spec = resolved(ModelSpec(init_from=str(tmp_path / "hf")), tmp_path / "hf")
    open_pretrained(tmp_path / "hf").check(spec)
    inputs_BT = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = theirs(input_ids=inputs_BT).logits
    for logits, _ in ranks.run(_begin, world_size, spec, "fp32", inputs_BT):
        torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)


def test_masters_keep_what_weights_in_bf16_round(ranks: Ranks, tmp_path: Path) -> None:
    theirs = _saved(tmp_path / "hf", torch.float32).state_dict()
    spec = resolved(ModelSpec(init_from=str(tmp_path / "hf")), tmp_path / "hf")
    answers = ranks.run(_begin, 2, spec, "bf16", torch.zeros(1, LENGTH, dtype=torch.int64))
    covered = 0
    for _, held in answers:
        for name, (start, data) in held.items():
            if "/head" in name:
                whole = theirs["lm_head.weight"].flatten()[start : start + len(data)]
            elif "/layers.2.mlp.experts." in name and name.endswith("gate_up"):
                expert = theirs["model.layers.2.mlp.experts.gate_up_proj"][int(name.split(".")[4])].flatten()
                whole = expert[start : start + len(data)]
            else:
                continue
            kind = name.partition("/")[0]
            wanted = {"param": whole.bfloat16(), "master": whole}.get(kind, torch.zeros_like(whole))
            assert torch.equal(data, wanted), name
            covered += len(data) if kind == "master" else 0
    assert covered == VOCAB * SPEC.hidden_size + SPEC.n_routed_experts * 2 * 24 * SPEC.hidden_size


def test_shapes_are_those_of_the_model() -> None:
    for changes in ({}, {"n_shared_experts": 2, "attention_bias": False, "qk_norm": False, "first_k_dense_replace": 0}):
        spec = SPEC.model_copy(update=changes)
        params, buffers = catalogue(spec, VOCAB)
        assert dict(shapes(spec, VOCAB)) == {param.name: param.shape for param in params} | dict(buffers)


def test_transformers_writes_experts_one_by_one(tmp_path: Path) -> None:
    """If this changes, the stacked form is what new directories have; both are read."""
    _saved(tmp_path / "hf", torch.float32)
    (index,) = (tmp_path / "hf").glob("*.index.json")
    names = json.loads(index.read_text())["weight_map"]
    assert "model.layers.1.mlp.experts.4.gate_proj.weight" in names


LARGE = {
    "hidden_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "n_routed_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 1024,
    "first_k_dense_replace": 0,
    "vocab_size": 8192,
}
SLACK = 200 * 2**20


def _write(directory: Path, spec: ModelSpec) -> int:
    """A directory with weights of any values in bf16, a file for each layer. Returns the largest tensor's bytes."""
    assert spec.vocab_size is not None
    (directory / "config.json").write_text(json.dumps(GLM4_MOE.configuration(spec, spec.vocab_size, 64, "bfloat16")))
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, shape in shapes(spec, spec.vocab_size):
        names = GLM4_MOE.their_names(name)
        file = f"{name.split('.')[1] if name.startswith('layers.') else 'rest'}.safetensors"
        for part in names:
            tensor = torch.full((shape[0] // len(names), *shape[1:]), 0.01, dtype=torch.bfloat16)
            files.setdefault(file, {})[part] = tensor
    for file, tensors in files.items():
        save_file(tensors, directory / file)
    index = {name: file for file, tensors in files.items() for name in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return max(t.numel() * 4 for tensors in files.values() for t in tensors.values())


def _read_large(rank: int, world_size: int, store: Store, prefix: str, spec: ModelSpec) -> tuple[int, int, int]:
    """On a rank: the most memory of its own while it built its engine and read, that at the end, and that of its
    state."""
    done, seen = threading.Event(), list[int]()

    def watch() -> None:
        while not done.wait(0.002):
            seen.append(_own_bytes())

    before = _own_bytes()
    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    placement = ExpertPlacement.balanced(spec.n_routed_experts, world_size)
    groups = connect(store, prefix, rank, placement, devices.backend(), timeout_s=60)
    assert spec.vocab_size is not None
    model = MoELanguageModel(spec, spec.vocab_size, ExpertParallelContext(placement, rank, groups.exchange))
    engine = DeepSpeedEngineAdapter(model, train_spec("fp32"), groups, devices.device(), CommunicationSpec())
    engine.on_weights_initialized()
    read_pretrained(spec, engine.ranges())
    engine.on_state_loaded(0)
    done.set()
    watching.join()
    parts = [part.data for _, part in engine.idle_state()]  # with DeepSpeed's own copy of the rank's partitions
    held = sum(part.numel() * part.element_size() for part in parts)
    return max(seen) - before, _own_bytes() - before, held


def _own_bytes() -> int:
    """Memory that is no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon:")).split()[1])


@pytest.mark.slow
@pytest.mark.on_cpu
def test_a_rank_reads_no_more_than_it_holds(ranks: Ranks, tmp_path: Path) -> None:
    spec = ModelSpec.model_validate(LARGE | {"embedding_scale": 1.0})
    largest = _write(tmp_path, spec)
    asked = resolved(ModelSpec(init_from=str(tmp_path)), tmp_path)
    open_pretrained(tmp_path).check(asked)
    for peak, after, held in ranks.run(_read_large, 2, asked):
        print(", ".join(f"{value / 1e6:.0f} MB" for value in (peak, after, held, largest)))
        assert held > 1e9 and peak <= min(after, held) + largest + SLACK
