"""Models that the library `transformers` builds from a config, as a module that maps tokens to logits.

Shape legend: B = rows, T = tokens in a row, N = tokens of all rows, V = vocabulary.
"""

import inspect
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.checkpoint.hf.pretrained import OTHER_CONFIG
from orchestrator.checkpoint.hf.transformers_config import ALIASES
from orchestrator.errors import EntrypointError
from orchestrator.model.moe.expert_parallel import ExpertParallelContext
from orchestrator.model.moe.routed_experts import RoutedExperts
from orchestrator.model.transformers_impl.transformers_experts import TransformersExperts, take_experts
from orchestrator.spec.model import BIAS_UPDATE_SPEED, ModelSpec

ATTENTION = ("full_attention", "sliding_attention")  # layers that can be kept within a document
PREFIX = "model.causal_lm."  # of names in `orchestrator.model.user_model`
_EXPERT = re.compile(r"(.+\.experts)\.experts\.(\d+)\.(gate_up|down)")
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")  # in a config; no model needs them in training


def build_transformers(spec: ModelSpec, vocab_size: int, home: ExpertParallelContext) -> "TransformersModel":
    """The model with unset weights. Experts of other ranks take no memory at any time.

    Raises:
        EntrypointError: transformers is not installed or doesn't know the model, or experts can't be spread.
    """
    device = torch.get_default_device()
    causal_lm = meta_model(spec, vocab_size)
    places = take_experts(causal_lm, spec)
    _keep_as_buffers(causal_lm)
    if device.type != "meta":
        causal_lm.to_empty(device=device)
        causal_lm.tie_weights()
        for module in causal_lm.modules():
            if module._non_persistent_buffers_set:  # tables that its building computes, such as those of positions
                causal_lm._init_weights(module)
    for layer, name in places:
        setattr(layer, name, TransformersExperts(spec, home, layer))
    _check_bias(spec, causal_lm)
    if spec.gradient_checkpointing == "full":
        causal_lm.activation_checkpointing_enable({"use_reentrant": False})
    return TransformersModel(spec, causal_lm)


def _check_bias(spec: ModelSpec, causal_lm: nn.Module) -> None:
    """Raises EntrypointError for a speed that the job sets, of biases that no router has."""
    experts = [layer for layer in causal_lm.modules() if isinstance(layer, RoutedExperts)]
    has_biases = any(layer.correction_bias_E is not None for layer in experts)
    if spec.bias_update_speed not in (0.0, BIAS_UPDATE_SPEED["sign"]) and not has_biases:
        raise EntrypointError(
            f"model.bias_update_speed is {spec.bias_update_speed:g}, and routers of {spec.origin} have no bias",
            remedy="Leave it out: they are balanced by model.router_aux_loss_coef, if at all.",
        )


def meta_model(spec: ModelSpec, vocab_size: int) -> Any:
    """The model as transformers has it, all experts stacked, without memory. Raises as `config_of`."""
    config = config_of(spec, vocab_size)
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    except Exception as error:  # of its modules, which check few of a config's values
        raise EntrypointError(
            f"transformers can't build a model from the config of {spec.origin}: {type(error).__name__}: {error}",
            remedy=OTHER_CONFIG,
        ) from error


def config_of(spec: ModelSpec, vocab_size: int) -> Any:
    """The config of transformers. Raises EntrypointError for an unknown `model_type`, or values that it refuses."""
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise EntrypointError(
            "model.impl is transformers, which is not installed here",
            remedy="pip install 'elastic-orchestrator[hf]', on every node.",
        ) from error
    keys: dict[str, Any] = {**spec.config, "vocab_size": vocab_size, "use_cache": False}
    keys["initializer_range"] = spec.initializer_range
    for name in ALIASES["n_routed_experts"]:
        known = keys.get(name)
        if known is not None and spec.n_routed_experts not in (known, *(known if isinstance(known, list) else ())):
            # A dry run has few experts, and groups would have too few each.
            fewer = [spec.n_routed_experts] * len(known) if isinstance(known, list) else spec.n_routed_experts
            keys |= {name: fewer, "n_group": 1, "topk_group": 1}
    keys |= {name: None for name in TOKENS if isinstance(keys.get(name), int) and keys[name] >= vocab_size}
    try:
        return AutoConfig.for_model(keys.pop("model_type"), **keys)
    except Exception as error:  # whatever its config classes raise
        raise EntrypointError(
            f"transformers takes no config of {spec.origin}: {error}",
            remedy=OTHER_CONFIG,
        ) from error


def _keep_as_buffers(model: nn.Module) -> None:
    """Make buffers of parameters that need no gradient, as they are state that training doesn't update."""
    for module in model.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            if not param.requires_grad:
                delattr(module, name)
                module.register_buffer(name, param.detach())


def their_name(name: str) -> tuple[str, int | None]:
    """Name of one of our tensors in the model of transformers, and of an expert's the index in the layer's stack."""
    expert = _EXPERT.fullmatch(name)
    if expert is None:
        return name.removeprefix(PREFIX), None
    return f"{expert[1].removeprefix(PREFIX)}.{expert[3]}_proj", int(expert[2])


class TransformersModel(nn.Module):
    """Maps tokens (B, T) to logits (B, T, V).

    Args:
        causal_lm: of transformers, with our experts.
    """

    def __init__(self, spec: ModelSpec, causal_lm: Any) -> None:
        super().__init__()
        self._spec, self.causal_lm = spec, causal_lm
        self._experts = [layer for layer in causal_lm.modules() if isinstance(layer, RoutedExperts)]
        takes = inspect.signature(causal_lm.forward).parameters
        has_biases = any(layer.correction_bias_E is not None for layer in self._experts)
        self._has_aux_loss = bool(self._experts) and not has_biases and "output_router_logits" in takes

    def forward(self, tokens_BT: Tensor, documents_BT: Tensor | None = None) -> Tensor:
        num_rows, more = len(tokens_BT), dict[str, Any]()
        if not num_rows:  # their code infers sizes from the number of tokens: a row goes through, and visits no expert
            tokens_BT = tokens_BT.new_zeros(1, tokens_BT.shape[1])
            documents_BT = None
            for layer in self._experts:
                layer.real_N = tokens_BT.new_zeros(0)
        if documents_BT is not None:
            more["position_ids"] = self._positions(documents_BT)
        if wants_aux := self._wants_aux_loss():
            more["output_router_logits"] = True
        output = self.causal_lm(input_ids=tokens_BT, use_cache=False, **more)
        if wants_aux:
            self._keep_aux_loss(output.aux_loss)
        logits_BTV: Tensor = output.logits
        return logits_BTV[:num_rows]

    def init_weights(self, seed: int) -> None:
        """Draw weights as transformers does; of experts their layers do it."""
        torch.manual_seed(seed)
        modules: Iterable[Any] = self.causal_lm.modules()
        for module in modules:  # else it takes them to be initialised, on the meta device
            module._is_hf_initialized = False
        self.causal_lm.init_weights()

    def _positions(self, documents_BT: Tensor) -> Tensor:
        """Positions within documents, by which transformers keeps attention within them."""
        kinds = set(getattr(self.causal_lm.config, "layer_types", None) or ATTENTION)
        if not kinds <= set(ATTENTION):
            raise EntrypointError(
                f"data.isolate_documents is true, and {self._spec.origin} has layers of type "
                f"{', '.join(sorted(kinds - set(ATTENTION)))}, which see all earlier tokens of a row",
                remedy="Set data.isolate_documents: false.",
            )
        index_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
        begins_BT = torch.ones_like(documents_BT, dtype=torch.bool)
        begins_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
        return index_T - torch.where(begins_BT, index_T, 0).cummax(1).values

    def _wants_aux_loss(self) -> bool:
        return self._has_aux_loss and self._spec.router_aux_loss_coef > 0 and torch.is_grad_enabled()

    def _keep_aux_loss(self, loss: Tensor) -> None:
        """Keep transformers' auxiliary loss, a mean over the tokens of all layers, as the sum that a layer has."""
        first = self._experts[0]
        num_tokens = first.last_counts_E.sum() / self._spec.num_experts_per_tok
        first.last_balance_loss = self._spec.router_aux_loss_coef * loss * num_tokens
