"""Names and shapes of the tensors of our own model, without building it, which would need torch."""

import re
from collections.abc import Iterator

from orchestrator.checkpoint.hf.family import BUFFERS, CONTEXT_QUERY, CORRECTION, KEYS, MASS, QUERY, ROUTER
from orchestrator.elastic.state_spec import ParamSpec, stacked_in
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.pretrained.lora import LoraSpec

_MODULE = re.compile(r"(layers\.\d+\.(?:attention|mlp(?:\.experts\.\d+|\.shared)?))\.(.+)")


def listed(spec: ModelSpec, vocab_size: int) -> tuple[list[ParamSpec], list[tuple[str, tuple[int, ...]]]]:
    """Every parameter of our model in order, and its persistent buffers as (name, shape): as
    `orchestrator.model.factory.catalogue` lists them, which builds the model."""
    params: list[ParamSpec] = []
    buffers: list[tuple[str, tuple[int, ...]]] = []
    base = shapes(spec, vocab_size)
    for name, shape in base if spec.lora is None else with_adapters(base, spec.lora):
        if name.endswith(BUFFERS):
            buffers.append((name, shape))
        else:
            params.append(ParamSpec.of(name, shape))
    return params, buffers


def with_adapters(base: Iterator[tuple[str, tuple[int, ...]]], lora: LoraSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The same with low-rank adapters, which come last in their module."""
    module, adapters = "", list[tuple[str, tuple[int, ...]]]()
    for name, shape in base:
        found = _MODULE.fullmatch(name)
        if (found[1] if found else "") != module:
            yield from adapters
            module, adapters = found[1] if found else "", []
        if found and found[2] in lora.matrices:
            prefix = f"{module}.lora.{found[2]}"
            adapters += [(f"{prefix}.A", (stacked_in(name) * lora.r, shape[1])), (f"{prefix}.B", (shape[0], lora.r))]
        yield name, shape


def shapes(spec: ModelSpec, vocab_size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every parameter and buffer of our model, in its order, without adapters."""
    wide = spec.hidden_size
    yield from (("head", (vocab_size, wide)), ("embedding.weight", (vocab_size, wide)))
    attention = _attention_shapes(spec) if spec.kv_lora_rank is None else _latent_shapes(spec, spec.kv_lora_rank)
    within: dict[str, tuple[int, ...]] = {"attention_norm.weight": (wide,), **attention, "mlp_norm.weight": (wide,)}
    routed = _router_shapes(spec)
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
    yield "norm.weight", (wide,)


def _router_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Those of a router, within a layer."""
    experts, wide, rank = spec.n_routed_experts, spec.hidden_size, spec.router.rank
    found: dict[str, tuple[int, ...]] = {CORRECTION: (experts,)}
    match spec.router.scorer:
        case "linear":
            found[ROUTER] = (experts, wide)
        case "attention":
            found |= {QUERY: (rank, wide), KEYS: (experts, rank)}
        case "context":
            queries = (spec.router.num_heads * rank, wide)
            found |= {QUERY: queries, CONTEXT_QUERY: queries, KEYS: (spec.router.num_heads * experts, rank)}
    if spec.router.selection == "top_p":
        found[MASS] = (1,)
    return found


def _attention_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Those of grouped-query attention, within a layer."""
    wide, queries, keys = (
        spec.hidden_size,
        spec.num_attention_heads * spec.head_dim,
        spec.num_key_value_heads * spec.head_dim,
    )
    found: dict[str, tuple[int, ...]] = {
        "attention.query": (queries, wide),
        "attention.key": (keys, wide),
        "attention.value": (keys, wide),
        "attention.output": (wide, queries),
    }
    if spec.attention_bias:
        found |= {f"attention.{kind}_bias": (n,) for kind, n in (("query", queries), ("key", keys), ("value", keys))}
    if spec.qk_norm:
        of_all = spec.qk_norm == "all_heads"
        sizes = (queries, keys) if of_all else (spec.head_dim, spec.head_dim)
        found |= {f"attention.{kind}_norm.weight": (n,) for kind, n in zip(("query", "key"), sizes, strict=True)}
    return found


def _latent_shapes(spec: ModelSpec, latent: int) -> dict[str, tuple[int, ...]]:
    """Those of multi-head latent attention, within a layer."""
    wide, heads, queries = spec.hidden_size, spec.num_attention_heads, spec.num_attention_heads * spec.key_dim
    rest: dict[str, tuple[int, ...]] = {
        "attention.latent": (latent + spec.qk_rope_head_dim, wide),
        "attention.key_value": (heads * (spec.qk_nope_head_dim + spec.v_head_dim), latent),
        "attention.output": (wide, heads * spec.v_head_dim),
    }
    norm = {"attention.latent_norm.weight": (latent,)}
    if spec.q_lora_rank is None:
        return {"attention.query": (queries, wide), **rest, **norm}
    of_queries = {
        "attention.query_down": (spec.q_lora_rank, wide),
        "attention.query_up": (queries, spec.q_lora_rank),
    }
    return {**of_queries, **rest, "attention.query_down_norm.weight": (spec.q_lora_rank,), **norm}
