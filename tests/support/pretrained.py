"""A small directory as transformers saves a `Glm4MoeForCausalLM`, made without torch for tests that look at it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from orchestrator.checkpoint.hf.families import GLM4_MOE
from orchestrator.checkpoint.hf.shapes import shapes
from orchestrator.data.tokenizer import TextTokenizer
from orchestrator.spec.model import ModelSpec

VOCAB = 300
SPEC = ModelSpec(
    vocab_size=VOCAB,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=24,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
    partial_rotary_factor=0.5,
)


def write_directory(directory: Path, **changes: Any) -> Path:
    """The directory, with keys of its config.json changed; None takes one out."""
    directory.mkdir(parents=True)
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for name, shape in shapes(SPEC, VOCAB):
        names = GLM4_MOE.their_names(name)
        for theirs in names:
            tensors[theirs] = np.ones((shape[0] // len(names), *shape[1:]), dtype=np.float32)
    save_file(tensors, directory / "model.safetensors")
    config = GLM4_MOE.configuration(SPEC, VOCAB, 32, "float32") | changes
    left = {key: value for key, value in config.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(left))
    _write_tokenizer(directory)
    return directory


def _write_tokenizer(directory: Path) -> None:
    TextTokenizer.train(["some text to learn from, and some more text"], 280).save(directory / "tokenizer.json")


def write_weights(directory: Path, spec: ModelSpec, seed: int = 0) -> Path:
    """A directory with random weights of our model, whose sizes are all given."""
    assert spec.vocab_size is not None
    directory.mkdir(parents=True)
    draws, tensors = np.random.default_rng(seed), dict[str, np.ndarray[Any, Any]]()
    for name, shape in shapes(spec, spec.vocab_size):
        parts = GLM4_MOE.their_names(name)
        for theirs in parts:
            sizes = (shape[0] // len(parts), *shape[1:])
            drawn = draws.normal(0.0, 0.1, sizes) if len(shape) > 1 else np.full(sizes, float("norm" in name))
            tensors[theirs] = drawn.astype(np.float32)
    save_file(tensors, directory / "model.safetensors")
    config = GLM4_MOE.configuration(spec, spec.vocab_size, 32, "float32")
    (directory / "config.json").write_text(json.dumps(config))
    _write_tokenizer(directory)
    return directory
