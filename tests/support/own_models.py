"""Modules of users, for tests: source text by what is special about it, and the model section that names it."""

import itertools
from pathlib import Path
from typing import Any

import yaml

from orchestrator.spec.model import ModelSpec

ROOT = Path(__file__).parents[2]

LINEAR = """
import torch
from torch import nn
from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.model.moe.expert_parallel import ExpertParallelContext
from orchestrator.model.moe.layer import MoELayer

class Model(nn.Module):
    def __init__(self, spec, vocab_size, experts):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, spec.hidden_size)
        {layers}
        self.head = nn.Linear(spec.hidden_size, vocab_size)
        {init}

    def forward(self, tokens{more}):
        {forward}

{methods}
def build(spec, vocab_size, experts):
    return Model(spec, vocab_size, experts)
"""

_numbers = itertools.count()


def linear(
    layers: str = "",
    init: str = "",
    more: str = "",
    forward: str = "return self.head(self.embedding(tokens))",
    methods: str = "",
) -> str:
    """Embedding and head, with something more in a place."""
    return LINEAR.format(layers=layers, init=init, more=more, forward=forward, methods=methods)


def own_spec(directory: Path, source: str, function: str = "build", **keys: Any) -> ModelSpec:
    """A module of that source, under a name that was never imported, as a model's entrypoint."""
    module = f"own_{next(_numbers)}"
    (directory / f"{module}.py").write_text(source)
    sizes = {"hidden_size": 16, "n_routed_experts": 4, "moe_intermediate_size": 8, "num_hidden_layers": 2}
    return ModelSpec(entrypoint=f"{module}:{function}", code_dir=str(directory), **(sizes | keys))


def example(name: str, **keys: Any) -> dict[str, Any]:
    """The model section of jobs/own-NAME.yaml, with other values for some keys."""
    section: dict[str, Any] = yaml.safe_load((ROOT / "jobs" / f"own-{name}.yaml").read_text())["model"]
    return section | {"code_dir": str(ROOT)} | keys
