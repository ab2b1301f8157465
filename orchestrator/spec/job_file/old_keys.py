"""Former names of keys and of values. A job that uses one is refused with the present name."""

from collections.abc import Mapping

OLD_KEYS: Mapping[str, str] = {
    "model.num_layers": "model.num_hidden_layers",
    "model.num_heads": "model.num_attention_heads",
    "model.num_kv_heads": "model.num_key_value_heads",
    "model.head_size": "model.head_dim",
    "model.num_dense_layers": "model.first_k_dense_replace",
    "model.num_experts": "model.n_routed_experts",
    "model.top_k": "model.num_experts_per_tok",
    "model.expert_intermediate_size": "model.moe_intermediate_size",
    "model.num_shared_experts": "model.n_shared_experts",
    "model.num_expert_groups": "model.n_group",
    "model.top_k_groups": "model.topk_group",
    "model.balance_loss_weight": "model.router_aux_loss_coef",
    "model.rope_fraction": "model.partial_rotary_factor",
    "model.norm_eps": "model.rms_norm_eps",
    "model.recompute": "model.gradient_checkpointing",
    "model.init_std": "model.initializer_range",
    "train.steps": "train.max_steps",
    "train.schedule": "train.lr_scheduler",
    "data.rows": "data.row_format",
}
OLD_VALUES: Mapping[str, str] = {"communication.tokens: exact": "native"}
