"""The `model` section: a decoder-only mixture-of-experts language model."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, JsonValue

from orchestrator.spec.exits import ExitsSpec, broken_exits
from orchestrator.spec.keys.section import HERE, Broken, CodeDir, broken_own_code
from orchestrator.spec.moe.router import Router, RouterSpec, broken_router, most_experts
from orchestrator.spec.pretrained.config_json import IN_CONFIG, OF_TRANSFORMERS, ModelSource, RopeScalingSpec
from orchestrator.spec.pretrained.lora import LoraSpec, broken_lora
from orchestrator.spec.task import Entrypoint

EMBEDDING_SCALE = 8.0  # a power of two, so that an export can multiply weights by it without rounding
BIAS_UPDATE_SPEED = {"quantile": 0.5, "sign": 1e-3}


class ModelSpec(ModelSource):
    """Sizes of the model. The first `first_k_dense_replace` layers have one dense MLP, the others routed experts."""

    vocab_size: int | None = Field(
        default=None,
        ge=1,
        description="Rows of the embedding and of the head; those beyond the tokenizer's tokens are never used. null: "
        "as many as the tokenizer or init_from has.",
    )
    hidden_size: int = Field(default=128, ge=1, description="Width of the residual stream.")
    num_hidden_layers: int = Field(default=4, ge=1, description="Layers, dense ones included.")
    num_attention_heads: int = Field(default=4, ge=1, description="Attention heads for queries.")
    num_key_value_heads: int = Field(
        default=2, ge=1, description="Attention heads for keys and values; divides num_attention_heads."
    )
    head_dim: int = Field(
        default_factory=lambda known: known["hidden_size"] // known["num_attention_heads"],
        ge=2,
        description="Width of an attention head, even. Default: hidden_size / num_attention_heads.",
    )
    intermediate_size: int = Field(default=384, ge=1, description="Inner width of the MLP in dense layers.")
    first_k_dense_replace: int = Field(
        default=1, ge=0, description="Leading layers with a dense MLP instead of experts."
    )
    n_routed_experts: int = Field(default=8, ge=1, description="Routed experts of each MoE layer.")
    num_experts_per_tok: int = Field(
        default=2,
        ge=1,
        description="Experts that each token visits; with router.selection top_p and expert_choice, on average.",
    )
    moe_intermediate_size: int = Field(default=192, ge=1, description="Inner width of an expert.")
    n_shared_experts: int = Field(default=1, ge=0, description="Experts that every token visits, without routing.")
    scoring_func: Literal["sigmoid", "softmax"] = Field(
        default="sigmoid",
        description="Scores of the router: sigmoid, balanced by a bias (bias_update_speed), or softmax, balanced by an "
        "auxiliary loss (router_aux_loss_coef).",
    )
    router: Router = Field(
        default=RouterSpec(),
        description="Scorer of the routers, and selection of the experts that a token visits. A name stands for "
        "{scorer: NAME}.",
    )
    norm_topk_prob: bool = Field(
        default=True, description="true: the weights of a token's experts add up to routed_scaling_factor."
    )
    n_group: int = Field(
        default=1, ge=1, description="Groups of equally many experts; a token visits only experts of its best groups."
    )
    topk_group: int = Field(default=1, ge=1, description="Groups whose experts a token may visit.")
    router_aux_loss_coef: float = Field(
        default=0.01, ge=0, description="Weight of the softmax router's auxiliary loss. Not used with sigmoid."
    )
    routed_scaling_factor: float = Field(
        default=1.0, gt=0, description="Factor on the sum of the routed experts' outputs."
    )
    attention_bias: bool = Field(default=False, description="true: biases on queries, keys and values.")
    qk_norm: bool | Literal["all_heads"] = Field(
        default=False,
        description="RMSNorm on queries and keys. true: on those of each head; all_heads: of all heads as one.",
    )
    kv_lora_rank: int | None = Field(
        default=None,
        ge=1,
        description="Width of the vector from which a token's keys and values of all heads are made (multi-head latent "
        "attention, arXiv:2405.04434). null: grouped-query attention, and the next five keys are not used.",
    )
    q_lora_rank: int | None = Field(
        default=None,
        ge=1,
        description="Width of the vector from which queries are made. null: from the hidden state.",
    )
    qk_nope_head_dim: int = Field(default=32, ge=1, description="Width of a head's keys, without their rotated part.")
    qk_rope_head_dim: int = Field(
        default=16, ge=2, description="Width of their rotated part, even; that of the keys is one for all heads."
    )
    v_head_dim: int = Field(default=32, ge=1, description="Width of a head's values.")
    rope_interleave: bool = Field(
        default=False, description="true: pairs that turn together are neighbours, as in DeepSeek's checkpoints."
    )
    rope_theta: float = Field(default=10_000.0, gt=0, description="Base of the rotary embedding's wavelengths.")
    rope_scaling: RopeScalingSpec | None = Field(
        default=None, description="Stretches these wavelengths, for a longer context. null: not."
    )
    partial_rotary_factor: float = Field(
        default=1.0, ge=0, le=1, description="Part of each head that is rotated; its width must be even."
    )
    rms_norm_eps: float = Field(default=1e-6, gt=0, description="Added to the mean square in RMSNorm.")
    gradient_checkpointing: Literal["none", "selective", "sqrt", "full"] = Field(
        default="none",
        description="Activations recomputed in the backward pass instead of kept: none, those of MLPs and experts "
        "(selective), all within about sqrt(num_hidden_layers) runs of layers (sqrt), or within each layer (full). The "
        "last three send tokens to experts once more.",
    )
    initializer_range: float = Field(default=0.02, gt=0, description="Standard deviation of the initial weights.")
    embedding_scale: float = Field(
        default_factory=lambda known: EMBEDDING_SCALE if known["init_from"] is None else 1.0,
        gt=0,
        description="Factor on the embedding before the first layer. With 1, at high learning rates, the first updates "
        "outweigh the differences between tokens, and routers send all of them to the same experts "
        "(docs/balance.md). Default: 8, with init_from 1. Not used with entrypoint.",
    )
    lora: LoraSpec | None = Field(
        default=None,
        description="Low-rank adapters beside the weights in init_from, which alone are trained (docs/lora.md). null: "
        "all weights are trained, or those that train.trainable names.",
    )
    exits: ExitsSpec | None = Field(
        default=None,
        description="Layers after which a token may leave the model while text is generated (docs/exits.md). null: "
        "every token runs all layers.",
    )
    bias_update: Literal["quantile", "sign"] = Field(
        default="quantile",
        description="Change of the router's load-balancing bias after each update. quantile: by a share of the way to "
        "the mean load, estimated from the scores of the step's tokens. sign: by a fixed step against the load.",
    )
    bias_update_speed: float = Field(
        default_factory=lambda known: (
            BIAS_UPDATE_SPEED[known["bias_update"]]
            if known["scoring_func"] == "sigmoid"
            and known["router"].selection != "expert_choice"
            and known["lora"] is None
            else 0.0
        ),
        ge=0,
        description="Size of a change: with quantile the share of the way, with sign the step in units of a score. "
        "0: no bias. Default: 0.5 with quantile, 0.001 with sign, 0 with softmax scores, expert_choice or "
        "lora.",
    )

    entrypoint: Entrypoint | None = Field(
        default=None,
        description='A function "package.module:build" that builds the model instead of ours; it gets these keys '
        "(docs/own-model.md).",
    )
    options: dict[str, JsonValue] = Field(default={}, description="Further keys for `entrypoint`, of your own choice.")
    code_dir: CodeDir = HERE

    @property
    def is_native(self) -> bool:
        """Whether it is our own model."""
        return self.entrypoint is None and self.impl == "native"

    @property
    def origin(self) -> str:
        """What builds the model, for messages."""
        return self.entrypoint or f"transformers ({self.config.get('model_type', 'no model_type')})"

    @property
    def libraries(self) -> tuple[str, ...]:
        """What computes beside torch, by the names of their distributions."""
        return ("transformers",) if self.impl == "transformers" else ()

    @property
    def rotary_size(self) -> int:
        """Width of the rotated part of a head."""
        if self.kv_lora_rank is not None:
            return self.qk_rope_head_dim
        return round(self.head_dim * self.partial_rotary_factor)

    @property
    def key_dim(self) -> int:
        """Width of a head's queries and keys."""
        return self.head_dim if self.kv_lora_rank is None else self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def value_dim(self) -> int:
        """Width of a head's values."""
        return self.head_dim if self.kv_lora_rank is None else self.v_head_dim

    @property
    def max_experts_per_tok(self) -> int:
        """Experts that a token visits at most."""
        return most_experts(self.router, self.num_experts_per_tok, self.n_routed_experts)

    @property
    def has_gaps(self) -> bool:
        """Whether tokens may visit fewer experts than others."""
        return self.router.selection != "top_k" or self.router.capacity_factor is not None

    @property
    def moe_layers(self) -> tuple[str, ...]:
        """Names of our model's MoE layers, as their parameters begin; none of a model that isn't ours."""
        layers = range(self.first_k_dense_replace, self.num_hidden_layers) if self.is_native else ()
        return tuple(f"layers.{layer}.mlp" for layer in layers)

    @property
    def fixes_experts(self) -> dict[str, str]:
        """Keys with which the number of experts can't change while they train, with the reasons."""
        found: dict[str, str] = {}
        if not self.is_native:
            key = "impl" if self.entrypoint is None else "entrypoint"
            found[key] = "routers of other models are not known"
        if self.lora is not None:
            found["lora"] = "the weights of other experts are in no file"
        if self.n_group > 1:
            found["n_group"] = "groups would get other experts"
        if self.scoring_func == "softmax" and not self.norm_topk_prob:
            found["norm_topk_prob"] = "scores of clones are parts of the scores before; set it to true"
        if self.scoring_func == "softmax" and self.bias_update_speed:
            found["bias_update_speed"] = "biases would outweigh scores of clones, parts of those before; set it to 0"
        if self.router.selection != "top_k":
            found["router.selection"] = f"{self.router.selection} counts clones one by one; set it to top_k"
        if self.router.capacity_factor is not None:
            found["router.capacity_factor"] = "all tokens of an expert go to its first clone at the beginning"
        return found

    @property
    def draws_in_forward(self) -> bool:
        """Whether our model's forward pass draws random numbers, which a recomputed one has to draw again."""
        return self.lora is not None and self.lora.lora_dropout > 0

    @property
    def router_key_scale(self) -> float:
        """Factor on experts' keys with which new routers with keys score as linear ones do: initial keys vary by
        `initializer_range`, and queries by that times the root of their width (`model.moe.routing.scorers`)."""
        return float(1.0 / (self.router.rank * self.initializer_range))

    @property
    def counts_margins(self) -> bool:
        """Whether routers count margins for the bias's quantile rule: not if every token visits all experts."""
        return (
            self.bias_update == "quantile"
            and self.bias_update_speed > 0
            and self.num_experts_per_tok < self.n_routed_experts
        )

    def broken_rules(self) -> Iterator[Broken]:
        yield from self._broken_entrypoint_rules()
        if self.bias_update == "quantile" and self.bias_update_speed > 1:
            keys = (("bias_update_speed",), ("bias_update",))
            rule = f"bias_update_speed must be at most 1 with bias_update: quantile; got {self.bias_update_speed:g}"
            yield Broken(keys, rule)
        if self.init_from is not None and self.embedding_scale != 1.0:
            rule = f"embedding_scale must be 1 with init_from, as its weights have it; got {self.embedding_scale:g}"
            yield Broken((("embedding_scale",), ("init_from",)), rule)
        if self.router.selection == "expert_choice" and self.bias_update_speed:
            rule = "bias_update_speed must be 0 with router.selection expert_choice, whose loads are equal; got "
            yield Broken((("bias_update_speed",), ("router", "selection")), rule + f"{self.bias_update_speed:g}")
        if self.router.scorer != "linear" and self.init_from is not None and not self.upcycle:
            rule = f"router.scorer must be linear with init_from, whose routers are; got {self.router.scorer}"
            yield Broken((("router", "scorer"), ("init_from",)), rule)
        if self.lora is not None:
            yield from self._broken_lora_rules()
        are_sizes_known = self.is_native and (self.init_from is None or self.model_fields_set >= IN_CONFIG)
        num_layers = self.num_hidden_layers if are_sizes_known else None
        origin = None if self.is_native else self.origin
        yield from broken_exits(self.exits, num_layers, origin, self.router.selection)
        yield from self.broken_upcycling()
        for key, value in self.router.compares_tokens.items() if self.upcycle else ():
            rule = f"router.{key} must not be {value} with upcycle: each token needs its experts, so that the mixture "
            yield Broken((("router", key), ("upcycle",)), rule + "begins as the dense model")
        if self.impl == "transformers":
            yield from self._broken_transformers_rules()
            return
        if self.config:
            yield Broken((("config",), ("impl",)), "config has a meaning with impl: transformers only; remove it")
        if self.init_from is not None and not self.model_fields_set >= IN_CONFIG:
            return  # the other sizes are in the directory; all are checked once it is read
        yield from self._broken_head_rules()
        if self.lora is not None:
            latents = self.kv_lora_rank is not None, self.q_lora_rank is not None
            yield from broken_lora(self.lora, *latents, self.num_hidden_layers - self.first_k_dense_replace)
        if self.num_attention_heads % self.num_key_value_heads:
            yield self._broken("num_key_value_heads", "must divide", "num_attention_heads")
        if self.num_experts_per_tok > self.n_routed_experts:
            yield self._broken("num_experts_per_tok", "must be at most", "n_routed_experts")
        if self.n_routed_experts % self.n_group:
            yield self._broken("n_group", "must divide", "n_routed_experts")
        elif self.topk_group > self.n_group:
            yield self._broken("topk_group", "must be at most", "n_group")
        elif self.n_group > 1 and self.num_experts_per_tok > (
            open_to_all := self.n_routed_experts // self.n_group * self.topk_group
        ):
            rule = f"num_experts_per_tok must be at most the {open_to_all} experts of topk_group groups"
            sizes = (("num_experts_per_tok",), ("topk_group",), ("n_group",), ("n_routed_experts",))
            yield Broken(sizes, f"{rule}; got {self.num_experts_per_tok}")
        if self.first_k_dense_replace > self.num_hidden_layers:
            yield self._broken("first_k_dense_replace", "must be at most", "num_hidden_layers")
        yield from broken_router(self.router, self.num_experts_per_tok, self.n_routed_experts, self.n_group)

    def _broken(self, key: str, rule: str, other: str) -> Broken:
        """A rule between two keys, with their values."""
        got = f"got {getattr(self, key)} and {getattr(self, other)}"
        return Broken(((key,), (other,)), f"{key} {rule} {other}; {got}")

    def _broken_lora_rules(self) -> Iterator[Broken]:
        if self.init_from is None or self.upcycle:
            rule = "lora needs a pretrained model in init_from, whose weights stay as they are; got "
            yield Broken((("lora",), ("init_from",), ("upcycle",)), rule + ("upcycle" if self.upcycle else "none"))
        if not self.is_native:
            rule = f"lora is of our own model; got {self.origin}"
            yield Broken((("lora",), ("impl",), ("entrypoint",)), rule)

    def _broken_head_rules(self) -> Iterator[Broken]:
        if self.kv_lora_rank is not None:
            yield from self._broken_latent_rules()
            return
        keys = (("head_dim",), ("num_attention_heads",), ("hidden_size",))
        if "head_dim" not in self.model_fields_set and self.hidden_size % self.num_attention_heads:
            sizes = f"{self.num_attention_heads} and {self.hidden_size}"
            yield Broken(keys, f"num_attention_heads must divide hidden_size unless head_dim is given; got {sizes}")
        elif self.head_dim % 2:
            yield Broken(keys, f"head_dim must be even, because rotary embedding turns pairs; got {self.head_dim}")
        elif abs(self.rotary_size - self.head_dim * self.partial_rotary_factor) > 1e-6 or self.rotary_size % 2:
            product = f"{self.partial_rotary_factor} * {self.head_dim}"
            yield Broken(
                (("partial_rotary_factor",), *keys),
                f"partial_rotary_factor * head_dim must be an even number; got {product}",
            )

    def _broken_transformers_rules(self) -> Iterator[Broken]:
        if self.entrypoint is not None:
            rule = f"entrypoint takes the place of impl: transformers; leave one out; got {self.entrypoint}"
            yield Broken((("impl",), ("entrypoint",)), rule)
        if self.init_from is None and "model_type" not in self.config:
            rule = "impl: transformers needs a model: set init_from, or config with its model_type"
            yield Broken((("impl",), ("config",)), rule)
        if self.upcycle:
            rule = "upcycle makes a mixture of ours; it must be false with impl: transformers"
            yield Broken((("upcycle",), ("impl",)), rule)
        if self.gradient_checkpointing not in ("none", "full"):
            rule = "gradient_checkpointing must be none or full with impl: transformers; got "
            yield Broken((("gradient_checkpointing",), ("impl",)), rule + self.gradient_checkpointing)
        for key in sorted((IN_CONFIG - OF_TRANSFORMERS | {"embedding_scale", "router"}) & self.model_fields_set):
            field = type(self).model_fields[key]
            if getattr(self, key) != field.get_default(call_default_factory=True, validated_data=vars(self)):
                yield Broken(((key,), ("impl",)), f"{key} is of our model; with impl: transformers, set it in config")

    def _broken_latent_rules(self) -> Iterator[Broken]:
        if self.qk_rope_head_dim % 2:
            rule = f"qk_rope_head_dim must be even, because rotary embedding turns pairs; got {self.qk_rope_head_dim}"
            yield Broken((("qk_rope_head_dim",),), rule)
        for key in ("attention_bias", "qk_norm"):
            if getattr(self, key):
                rule = f"{key} must be false with kv_lora_rank: latents have norms of their own; got true"
                yield Broken(((key,), ("kv_lora_rank",)), rule)

    def _broken_entrypoint_rules(self) -> Iterator[Broken]:
        if self.entrypoint is not None:
            if self.gradient_checkpointing != "none":
                rule = "gradient_checkpointing must be none with entrypoint: your own model recomputes itself; got "
                keys = (("gradient_checkpointing",), ("entrypoint",))
                yield Broken(keys, rule + self.gradient_checkpointing)
            if self.init_from is not None:
                rule = "init_from is for our own model; with entrypoint, let your init_weights(seed) read the weights"
                yield Broken((("init_from",), ("entrypoint",)), rule)
            return
        yield from broken_own_code(self.entrypoint, self.options, self.code_dir)
