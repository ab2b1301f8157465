"""Names and shapes of the tensors of our own model, without building it."""

from collections.abc import Iterator

from orchestrator.checkpoint.hf.family import CORRECTION
from orchestrator.spec.model import ModelSpec


def shapes(spec: ModelSpec, vocab_size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every parameter and buffer of our model."""
    wide, queries, keys = (
        spec.hidden_size,
        spec.num_attention_heads * spec.head_dim,
        spec.num_key_value_heads * spec.head_dim,
    )
    yield from (("embedding.weight", (vocab_size, wide)), ("norm.weight", (wide,)), ("head", (vocab_size, wide)))
    within: dict[str, tuple[int, ...]] = {"attention_norm.weight": (wide,), "mlp_norm.weight": (wide,)}
    if spec.kv_lora_rank is not None:
        within |= _latent_shapes(spec, spec.kv_lora_rank)
    else:
        within |= {
            "attention.query": (queries, wide),
            "attention.key": (keys, wide),
            "attention.value": (keys, wide),
            "attention.output": (wide, queries),
        }
    if spec.attention_bias:
        within |= {f"attention.{kind}_bias": (n,) for kind, n in (("query", queries), ("key", keys), ("value", keys))}
    if spec.qk_norm:
        of_all = spec.qk_norm == "all_heads"
        sizes = (queries, keys) if of_all else (spec.head_dim, spec.head_dim)
        within |= {f"attention.{kind}_norm.weight": (n,) for kind, n in zip(("query", "key"), sizes, strict=True)}
    routed: dict[str, tuple[int, ...]] = {
        "mlp.router.weight": (spec.n_routed_experts, wide),
        CORRECTION: (spec.n_routed_experts,),
    }
    widths = {f"experts.{expert}.": spec.moe_intermediate_size for expert in range(spec.n_routed_experts)}
    if spec.n_shared_experts:
        widths["shared."] = spec.n_shared_experts * spec.moe_intermediate_size
    for layer in range(spec.num_hidden_layers):
        dense = layer < spec.first_k_dense_replace
        for inner, shape in within.items() if dense else (within | routed).items():
            yield f"layers.{layer}.{inner}", shape
        for mlp, width in ({"": spec.intermediate_size} if dense else widths).items():
            yield f"layers.{layer}.mlp.{mlp}gate_up", (2 * width, wide)
            yield f"layers.{layer}.mlp.{mlp}down", (wide, width)


def _latent_shapes(spec: ModelSpec, latent: int) -> dict[str, tuple[int, ...]]:
    """Those of multi-head latent attention, within a layer."""
    wide, heads, queries = spec.hidden_size, spec.num_attention_heads, spec.num_attention_heads * spec.key_dim
    found: dict[str, tuple[int, ...]] = {
        "attention.latent": (latent + spec.qk_rope_head_dim, wide),
        "attention.latent_norm.weight": (latent,),
        "attention.key_value": (heads * (spec.qk_nope_head_dim + spec.v_head_dim), latent),
        "attention.output": (wide, heads * spec.v_head_dim),
    }
    if spec.q_lora_rank is None:
        return found | {"attention.query": (queries, wide)}
    return found | {
        "attention.query_down": (spec.q_lora_rank, wide),
        "attention.query_down_norm.weight": (spec.q_lora_rank,),
        "attention.query_up": (queries, spec.q_lora_rank),
    }
