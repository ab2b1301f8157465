"""Our model against Hugging Face's `Glm4MoeForCausalLM`: the same weights, logits and gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, Glm4MoeConfig, Glm4MoeForCausalLM

from orchestrator.checkpoint.hf import export
from orchestrator.checkpoint.hf.export import export_hf
from orchestrator.checkpoint.hf.families import GLM4_MOE
from orchestrator.checkpoint.manifest import manifest_of
from orchestrator.checkpoint.shard_file import ShardPiece, read_shards
from orchestrator.checkpoint.write import commit
from orchestrator.data.tokenizer import TextTokenizer
from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.errors import CheckpointCorrupt, UsageError
from orchestrator.model.loss import IGNORED
from orchestrator.model.moe.expert_parallel import ExpertParallelContext
from orchestrator.model.transformer import MoELanguageModel
from orchestrator.spec.job import JobSpec
from orchestrator.spec.model import ModelSpec
from tests.support.checkpoints import write_shard

VOCAB, LENGTH = 97, 24
PLAIN = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
}
VARIANTS = {
    "plain": {},
    "half of each head rotated": {"partial_rotary_factor": 0.5},
    "norm on queries and keys": {"qk_norm": True, "head_dim": 16},
    "biases in attention": {"attention_bias": True},
    "groups of experts": {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
    "two shared experts": {"n_shared_experts": 2, "first_k_dense_replace": 2},
    "all of it": {
        "partial_rotary_factor": 0.5,
        "qk_norm": True,
        "attention_bias": True,
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 1.8,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-5,
    },
}


def _both(spec: ModelSpec) -> tuple[MoELanguageModel, Glm4MoeForCausalLM]:
    ours = MoELanguageModel(
        spec, VOCAB, ExpertParallelContext(ExpertPlacement.balanced(spec.n_routed_experts, 1), 0, None)
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in ours.parameters():
            param.normal_(0.0, 0.2, generator=generator)
        for layer in ours.moe_layers:
            layer.router.correction_bias_E.normal_(0.0, 0.1, generator=generator)
    theirs = Glm4MoeForCausalLM(Glm4MoeConfig(**GLM4_MOE.configuration(spec, VOCAB, LENGTH, "float32")))
    theirs.config._attn_implementation = "eager"
    _copy(ours, theirs)
    return ours, theirs


def _copy(ours: MoELanguageModel, theirs: Glm4MoeForCausalLM) -> None:
    """Put our weights into their modules, where experts are stacked and gate and up are one matrix, as here."""
    state = theirs.state_dict()
    filled = set()
    for name, tensor in [*ours.named_parameters(), *ours.state_buffers()]:
        for their_name, part in GLM4_MOE.renamed(name, tensor.detach().numpy(), ours.spec.embedding_scale):
            filled |= _put(state, their_name, torch.from_numpy(part))
    assert filled == set(state), set(state) ^ filled


def _put(state: dict[str, torch.Tensor], name: str, part: torch.Tensor) -> set[str]:
    head, experts, tail = name.partition(".experts.")
    if not experts:
        state[name].copy_(part)
        return {name}
    number, kind, _ = tail.split(".")
    stacked = f"{head}.experts.{'down_proj' if kind == 'down_proj' else 'gate_up_proj'}"
    place = state[stacked][int(number)]
    half = place.shape[0] // 2
    {"down_proj": place, "gate_proj": place[:half], "up_proj": place[half:]}[kind].copy_(part)
    return {stacked}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients_equal_transformers(variant: str) -> None:
    ours, theirs = _both(ModelSpec(**(PLAIN | VARIANTS[variant])))  # type: ignore[arg-type]
    tokens_BU = torch.randint(0, VOCAB, (2, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    inputs_BT, targets_BT = tokens_BU[:, :-1], tokens_BU[:, 1:].contiguous()
    targets_BT[0, :5] = IGNORED
    their_logits = theirs(input_ids=inputs_BT).logits
    torch.testing.assert_close(ours(inputs_BT), their_logits, rtol=2e-5, atol=2e-5)

    ours(inputs_BT, targets_BT).backward()
    F.cross_entropy(their_logits.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED, reduction="sum").backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    wanted = {name: torch.zeros_like(grad) for name, grad in gradients.items() if grad is not None}
    for name, param in ours.named_parameters():
        assert param.grad is not None, name
        for their_name, part in GLM4_MOE.renamed(
            name, param.grad.numpy(), 1.0 / ours.spec.embedding_scale
        ):  # a factor of ours alone
            _put(wanted, their_name, torch.from_numpy(part))
    for name, grad in wanted.items():
        scale = gradients[name].abs().max().item()  # type: ignore[union-attr]
        torch.testing.assert_close(grad, gradients[name], rtol=1e-4, atol=1e-5 * max(scale, 1e-3), msg=name)


def _checkpoint_of(model: MoELanguageModel, directory: Path) -> Path:
    """What a run would have saved, in two shards."""
    tensors = {f"master/{name}": p for name, p in model.named_parameters()}
    tensors |= {f"buffer/{name}": b for name, b in model.state_buffers()}
    shards = []
    for rank in range(2):
        pieces = []
        for name, tensor in tensors.items():
            flat = tensor.detach().flatten().numpy()
            start, stop = (0, len(flat) // 2) if rank == 0 else (len(flat) // 2, len(flat))
            if start < stop:
                pieces.append(ShardPiece(name, start, stop, flat[start:stop]))
        shards.append(write_shard(directory, pieces, step=7, term=1, generation=0, rank=rank, meta="{}"))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    written = read_shards(directory, shards, term=1)
    return commit(directory, manifest_of(written, run_id="run", term=1, shapes=shapes))


@pytest.mark.parametrize(
    ("dtype", "tolerance", "router"),
    [("fp32", 2e-5, {}), ("bf16", 0.2, {}), ("fp32", 2e-5, {"scorer": "attention", "rank": 4})],
    ids=["fp32", "bf16", "attention"],
)
def test_transformers_loads_what_is_exported(
    store_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    tolerance: float,
    router: dict[str, Any],
) -> None:
    monkeypatch.setattr(export, "FILE_BYTES", 100_000)  # several files
    tokenizer = store_dir / "tokenizer.json"
    vocab_size = Tokenizer.from_file(str(tokenizer)).get_vocab_size()
    spec = ModelSpec.model_validate(PLAIN | VARIANTS["all of it"] | {"router": router})
    ours = MoELanguageModel(
        spec, vocab_size, ExpertParallelContext(ExpertPlacement.balanced(spec.n_routed_experts, 1), 0, None)
    )
    ours.init_weights(3)
    for layer in ours.moe_layers:
        layer.router.correction_bias_E.normal_(0.0, 0.1)
    job = JobSpec(name="run", model=spec)
    checkpoint = _checkpoint_of(ours, tmp_path / "checkpoints")
    export_hf(checkpoint, job, tokenizer, tmp_path / "hf", dtype)

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto", attn_implementation="eager")
    assert type(theirs).__name__ == "Glm4MoeForCausalLM"
    text = "def main() -> None:"
    encoded = AutoTokenizer.from_pretrained(tmp_path / "hf")(text, return_tensors="pt")["input_ids"]
    assert encoded[0].tolist() == Tokenizer.from_file(str(tokenizer)).encode(text).ids
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=encoded).logits.float(), ours(encoded), rtol=0.0, atol=tolerance)
    assert len({path.stat().st_mode for path in (tmp_path / "hf").iterdir()}) == 1
    with pytest.raises(UsageError, match="not empty"):
        export_hf(checkpoint, job, tokenizer, tmp_path / "hf", dtype)


def test_another_tokenizers_border_and_a_padded_vocabulary_are_exported(store_dir: Path, tmp_path: Path) -> None:
    foreign = (store_dir / "tokenizer.json").read_bytes().replace(b"<|document|>", b"<|endoftext|>")
    (tmp_path / "foreign").mkdir()
    TextTokenizer(foreign, "e").save(tmp_path / "foreign" / "tokenizer.json")
    used = TextTokenizer.load(tmp_path / "foreign" / "tokenizer.json")
    spec = ModelSpec(**(PLAIN | {"vocab_size": used.vocab_size + 9}))  # type: ignore[arg-type]
    ours = MoELanguageModel(
        spec, used.vocab_size + 9, ExpertParallelContext(ExpertPlacement.balanced(spec.n_routed_experts, 1), 0, None)
    )
    ours.init_weights(3)
    checkpoint = _checkpoint_of(ours, tmp_path / "checkpoints")
    export_hf(checkpoint, JobSpec(name="run", model=spec), tmp_path / "foreign" / "tokenizer.json", tmp_path / "hf")
    again = TextTokenizer.load(tmp_path / "hf" / "tokenizer.json")
    assert (again.document_token, again.digest) == (used.document_token, used.digest)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert theirs.generation_config.eos_token_id == used.document_token
    assert theirs.config.vocab_size == used.vocab_size + 9


def test_a_checkpoint_of_another_model_is_not_exported(store_dir: Path, tmp_path: Path) -> None:
    spec = ModelSpec(**PLAIN)  # type: ignore[arg-type]
    ours = MoELanguageModel(
        spec, VOCAB, ExpertParallelContext(ExpertPlacement.balanced(spec.n_routed_experts, 1), 0, None)
    )
    ours.init_weights(3)
    checkpoint = _checkpoint_of(ours, tmp_path / "checkpoints")
    with pytest.raises(CheckpointCorrupt, match="master/head has shape"):
        export_hf(checkpoint, JobSpec(name="run", model=spec), store_dir / "tokenizer.json", tmp_path / "hf")
    assert not (tmp_path / "hf").exists() and not list(tmp_path.glob(".hf*"))


def test_rounding_is_that_of_torch() -> None:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-20, 20).repeat(250)
    edges = torch.tensor([0.0, -0.0, 1.0 + 2**-8, 1.0 + 3 * 2**-8, 3.3895e38, float("inf")])  # ties, the largest
    values = torch.cat([values, edges])
    found = torch.from_numpy(export.rounded_to_bf16(values.numpy()).view("int16")).view(torch.bfloat16)
    assert torch.equal(found, values.bfloat16())
