"""Sizes of a model that transformers builds, from its `config.json`: torch-free, for plans made before it is built.

`orchestrator.model.transformers_impl` builds it, and compares what it finds with these.
"""

from collections.abc import Mapping
from typing import Any

from orchestrator.errors import UsageError

# Names of a size in the configs of transformers' models, the most particular first.
ALIASES = {
    "n_routed_experts": ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts"),
    "num_experts_per_tok": ("num_experts_per_tok", "moe_topk", "moe_k"),
    "moe_intermediate_size": ("moe_intermediate_size", "intermediate_size"),
}
NEEDED = ("hidden_size", "num_hidden_layers")
# Types of models whose routers choose experts by score and a bias, which training moves against the load.
WITH_CORRECTION = frozenset(
    {
        "afmoe",
        "deepseek_v3",
        "dots1",
        "ernie4_5_moe",
        "exaone_moe",
        "glm4_moe",
        "glm4_moe_lite",
        "lfm2_moe",
        "minimax_m2",
        "solar_open",
    }
)
AUX_LOSS = "router_aux_loss_coef"


def transformers_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json` as our `model` section, for `impl: transformers`.

    Raises:
        UsageError: keys are missing. It names all of them.
    """
    found: dict[str, Any] = {key: config.get(key) for key in (*NEEDED, "vocab_size")}
    for ours, names in ALIASES.items():
        found[ours] = next((config[name] for name in names if config.get(name) is not None), None)
    missing = [" or ".join(ALIASES.get(key, (key,))) for key, size in found.items() if _is_missing(key, size)]
    if config.get("model_type") is None:
        missing.insert(0, "model_type")
    if missing:
        raise UsageError(f"it lacks {', '.join(missing)}, without which its memory can't be planned")
    wrong = [f"{key} {size!r}" for key, size in found.items() if not isinstance(size, int | None)]
    if wrong:
        raise UsageError(f"it has {', '.join(wrong)}; these must be whole numbers")
    has_bias = config["model_type"] in WITH_CORRECTION
    settings = {key: size for key, size in found.items() if size is not None}
    settings |= {"router": "sigmoid" if has_bias else "softmax", "config": dict(config)}
    if has_bias:
        settings |= {"bias_update": "sign"}  # the other rule needs scores, which these routers keep to themselves
    if config.get(AUX_LOSS) is not None:
        settings[AUX_LOSS] = config[AUX_LOSS]
    return settings


def _is_missing(key: str, size: object) -> bool:
    return size is None and key != "vocab_size"  # which is the tokenizer's then
