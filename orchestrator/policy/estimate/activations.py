"""Activations that our model keeps of a micro-batch for its backward pass, by formula: an estimate without torch.

Counted from the tensors that autograd saves; `tests/unit/model/test_planned_activations.py` compares. Bytes per token
unless noted otherwise.
"""

import math

from orchestrator.spec.model import ModelSpec
from orchestrator.spec.train import TrainSpec

LOGITS = 1 << 22  # elements of a chunk of logits on a CPU, and the fewest tokens in one: orchestrator.model.loss
MIN_CHUNK = 64


def activation_bytes(spec: ModelSpec, train: TrainSpec, crowding: float) -> int:
    """Most bytes of activations that one rank keeps at one time.

    Args:
        crowding: ratio of token copies that reach the rank's experts to those that it sends; 0 in a world of one, where
            nothing is sent and experts read tokens in place.
    """
    item = item_bytes(train)
    stream = item * spec.hidden_size
    mlps = [_norm(spec, item) + _mlp(spec, index, item, crowding) for index in range(spec.num_hidden_layers)]
    attention = _norm(spec, item) + _attention(spec, item)
    blocks = [attention + mlp for mlp in mlps]
    if spec.gradient_checkpointing == "none":
        kept = sum(blocks)
    elif spec.gradient_checkpointing == "selective":
        kept = len(blocks) * (attention + stream) + max(mlps)
    else:
        size = 1 if spec.gradient_checkpointing == "full" else math.isqrt(spec.num_hidden_layers - 1) + 1
        runs = [blocks[start : start + size] for start in range(0, len(blocks), size)]
        kept = len(runs) * stream + max(map(sum, runs))
    return (kept + _num_states(spec) * _norm(spec, item)) * _micro_batch_tokens(train)


def loss_bytes(spec: ModelSpec, train: TrainSpec, vocab_size: int, num_held: int = 1) -> int:
    """Bytes of a chunk of logits with its copy in the training precision, of the output matrix's fp32 gradient, and of
    the hidden states of exits beside the last layer's.

    Args:
        num_held: tensors of the logits' size that the loss holds at once.
    """
    tokens = _num_states(spec) * _micro_batch_tokens(train)
    chunk = min(tokens, max(MIN_CHUNK, LOGITS // num_held // vocab_size))
    of_states = item_bytes(train) * tokens * spec.hidden_size if _num_states(spec) > 1 else 0  # one after the other
    logits = chunk * vocab_size * (4 * num_held + item_bytes(train) % 4)
    return logits + 4 * vocab_size * spec.hidden_size + of_states


def _num_states(spec: ModelSpec) -> int:
    """Hidden states of a token of which there is a loss: those of exits, and the last layer's."""
    return 1 if spec.exits is None else 1 + len(spec.exits.layers)


def item_bytes(train: TrainSpec) -> int:
    """Bytes of a weight or an activation."""
    return 2 if train.precision == "bf16" else 4


def _micro_batch_tokens(train: TrainSpec) -> int:
    return max(train.micro_batch_tokens, train.sequence_length)


def _norm(spec: ModelSpec, item: int) -> int:
    """Bytes of a norm: its input, and that over its root mean square, in fp32; its output."""
    return 4 * (2 * spec.hidden_size + 1) + item * spec.hidden_size


def _attention(spec: ModelSpec, item: int) -> int:
    """Bytes of queries, keys, values and outputs of all heads; of latents also their norms, and the outputs once more
    without what makes all widths equal."""
    heads = spec.num_attention_heads
    if spec.kv_lora_rank is None:
        return item * 2 * spec.head_dim * (heads + spec.num_key_value_heads)
    latents = [rank for rank in (spec.kv_lora_rank, spec.q_lora_rank) if rank is not None]
    normed = sum(4 * (2 * rank + 1) + item * rank for rank in latents)
    return normed + item * heads * (4 * max(spec.key_dim, spec.value_dim) + spec.value_dim)


def _mlp(spec: ModelSpec, index: int, item: int, crowding: float) -> int:
    if index < spec.first_k_dense_replace:
        return item * 4 * spec.intermediate_size  # gate and up, silu(gate), their product
    shared = item * 4 * spec.n_shared_experts * spec.moe_intermediate_size
    scores = (
        4 * spec.n_routed_experts + 32 * spec.num_experts_per_tok + (4 * spec.hidden_size if item == 2 else 0)
    )  # in fp32
    if spec.router.scorer == "context":  # in fp32: the context, also normalized; queries; logits of heads, and of all
        heads, experts = spec.router.num_heads, spec.n_routed_experts
        scores += 4 * (2 * spec.hidden_size + 1 + heads * (spec.router.rank + experts) + experts)
    inner = 2 * spec.num_experts_per_tok * (crowding or 1.0) * spec.moe_intermediate_size  # gate and up
    travelled = (
        spec.num_experts_per_tok * crowding * spec.hidden_size
    )  # received copies; fewer where several came as one
    return shared + scores + math.ceil(item * (inner + travelled))
