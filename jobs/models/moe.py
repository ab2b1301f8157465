"""The transformer of dense.py with experts in every second block: an example of a model of your own with our MoE layer.

`MoELayer` spreads its experts over the workers and moves them when their number changes. It needs nothing but the two
arguments of `build`, and maps (rows, tokens, hidden_size) to the same shape.

    orchestrator run jobs/own-moe.yaml --local          # from the directory above jobs/
"""

from torch import nn

from jobs.models.dense import Block, Transformer, mlp
from orchestrator.model.moe.layer import MoELayer


def build(spec, vocab_size, experts) -> nn.Module:
    """`spec.n_routed_experts`, `num_experts_per_tok` and the other keys of the `model` section shape the MoE layers."""
    size = spec.hidden_size
    blocks = []
    for index in range(spec.num_hidden_layers):
        has_experts = index % spec.options["experts_every"] == 1
        inner = MoELayer(spec, experts) if has_experts else mlp(size, spec.intermediate_size)
        blocks.append(Block(size, spec.num_attention_heads, inner))
    return Transformer(vocab_size, size, spec.options["max_length"], blocks)
