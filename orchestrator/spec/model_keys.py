"""Sets of keys of the model section."""

# Keys of mixtures alone.
OF_EXPERTS = frozenset(
    {
        "first_k_dense_replace",
        "n_routed_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "n_shared_experts",
        "router",
        "norm_topk_prob",
        "n_group",
        "topk_group",
        "routed_scaling_factor",
    }
)
# Keys that an init_from directory's config.json sets too.
IN_CONFIG = OF_EXPERTS | {
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "attention_bias",
    "qk_norm",
    "rope_theta",
    "partial_rotary_factor",
    "rms_norm_eps",
    "kv_lora_rank",
    "q_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "rope_interleave",
    "rope_scaling",
}
# Keys with the values by which a mixture of equal experts is the dense model that they come from.
UPCYCLED = {"n_shared_experts": 0, "norm_topk_prob": True, "routed_scaling_factor": 1.0}
# Keys that say how large a model is that transformers builds (`impl: transformers`), of which its own config says all.
OF_TRANSFORMERS = frozenset(
    {
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "n_routed_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "router",
        "n_group",
        "topk_group",
    }
)
