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
OF_TRAINING = ("router_aux_loss_coef", "initializer_range")  # keys of a config that a job may set otherwise


def transformers_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json` as our `model` section, for `impl: transformers`.

    Raises:
        UsageError: keys are missing. It names all of them.
    """
    found: dict[str, Any] = {key: config.get(key) for key in (*NEEDED, "vocab_size")}
    for ours, names in ALIASES.items():
        found[ours] = next((_single(config[name]) for name in names if config.get(name) is not None), None)
    missing = [" or ".join(ALIASES.get(key, (key,))) for key, size in found.items() if _is_missing(key, size)]
    if config.get("model_type") is None:
        missing.insert(0, "model_type")
    if missing:
        raise UsageError(f"it lacks {', '.join(missing)}, without which its memory can't be planned")
    wrong = [f"{key} {size!r}" for key, size in found.items() if not isinstance(size, int | None)]
    if wrong:
        raise UsageError(f"it has {', '.join(wrong)}; these must be whole numbers")
    if config.get("quantization_config") is not None:
        raise UsageError("it has quantization_config, and weights that are quantized can't be trained")
    settings = {key: value for key, value in found.items() if value is not None}
    settings |= {key: config[key] for key in OF_TRAINING if config.get(key) is not None}
    # A router of transformers keeps its scores to itself, which the other rule for biases needs. Where it has no bias,
    # nothing is moved.
    return settings | {"scoring_func": "sigmoid", "bias_update": "sign", "config": dict(config)}


def _single(size: object) -> object:
    """The size; of a list, as some configs have with one for each layer, the value that all of them have."""
    return size[0] if isinstance(size, list) and len(set(map(str, size))) == 1 else size


def _is_missing(key: str, size: object) -> bool:
    return size is None and key != "vocab_size"  # which is the tokenizer's then
