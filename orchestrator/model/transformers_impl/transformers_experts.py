"""The experts of a layer that transformers builds, spread over ranks.

transformers calls every mixture's experts in one way, with a router's choice: `(hidden_states, top_k_index,
top_k_weights)` (`transformers.integrations.moe`). So our module takes the place of theirs, whatever the model.

Shape legend: N = tokens, K = experts per token, D = hidden size, E = experts.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.errors import EntrypointError
from orchestrator.model.moe.expert_parallel import ExpertParallelContext
from orchestrator.model.moe.routed_experts import RoutedExperts
from orchestrator.spec.model import ModelSpec

# Names of the bias of a layer's router, in the layer or in a part of it.
BIASES = ("e_score_correction_bias", "expert_bias")
MARK = "is_concatenated"  # attribute that transformers gives to experts with this interface
SILU = ("SiLUActivation", "SiLU", "silu")


class TransformersExperts(RoutedExperts):
    """Routed experts in a layer that has a router and shared experts of its own.

    Args:
        layer: of transformers, in which this takes the experts' place.
    """

    def __init__(self, spec: ModelSpec, home: ExpertParallelContext, layer: nn.Module) -> None:
        super().__init__(spec, home)
        self._bias = list(_biases(layer))[:1]  # a list: no submodule of this one

    @property
    def correction_bias_E(self) -> Tensor | None:
        if not self._bias:
            return None
        module, name = self._bias[0]
        bias: Tensor = getattr(module, name)
        return bias.view(-1)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Outputs (N, D) for tokens (N, D), and for each the ids (N, K) of its experts and their weights."""
        x_ND, ids_NK, gates_NK = hidden_states, top_k_index, top_k_weights.to(hidden_states.dtype)
        self.last_balance_loss = None
        if self.real_N is None:
            return self._mix(x_ND, ids_NK, gates_NK)
        real_N = self.real_N
        mixed_ND = self._mix(x_ND[real_N], ids_NK[real_N], gates_NK[real_N])
        return torch.zeros_like(x_ND).index_copy(0, real_N, mixed_ND)

    def _mix(self, x_ND: Tensor, ids_NK: Tensor, gates_NK: Tensor) -> Tensor:
        before = self._recomputed()
        if before is None:
            self._count(ids_NK)
        chosen_NK = ids_NK if before is None else before.expert_ids_NK
        # Computed again, gates may be in another order. Both passes do the same, as both have to keep the same tensors.
        gates_NK = (gates_NK[:, None, :] * (chosen_NK[:, :, None] == ids_NK[:, None, :])).sum(2)
        return self._run(self._needs_grad(x_ND), chosen_NK, gates_NK, before=before)


def take_experts(model: nn.Module, spec: ModelSpec) -> list[tuple[nn.Module, str]]:
    """Take all experts out of a model of transformers. Returns their places: layers, and the name within them.

    Raises:
        EntrypointError: they compute something else than ours, or there are none.
    """
    found = {name: module for name, module in model.named_modules() if hasattr(module, MARK)}
    places: list[tuple[nn.Module, str]] = []
    for name, theirs in found.items():
        if reasons := [*_differences(theirs, spec)]:
            raise EntrypointError(
                f"{type(theirs).__name__} of {spec.origin} can't be spread over workers: {'; '.join(reasons)}",
                remedy="docs/pretrained.md has the models that were tried; a module of your own can be any "
                "(model.entrypoint).",
            )
        parent, _, attribute = name.rpartition(".")
        places.append((model.get_submodule(parent), attribute))
        setattr(*places[-1], nn.Module())
    if not found and spec.n_routed_experts > 1:
        raise EntrypointError(
            f"{spec.origin} has no experts with the interface by which ours could take their place",
            remedy="docs/pretrained.md has the models that were tried.",
        )
    return places


def _differences(theirs: Any, spec: ModelSpec) -> Iterator[str]:
    """What these experts do that ours don't: ours are gated MLPs with SiLU, without biases."""
    wanted = {"is_concatenated": True, "is_transposed": False, "has_gate": True, "has_bias": False}
    wanted |= {"has_post_expert_norm": False}
    for name, value in wanted.items():
        if getattr(theirs, name, value) != value:
            yield f"{name} is {not value}"
    if type(theirs)._apply_gate.__name__ != "_default_apply_gate":
        yield "their gate is one of their own"
    activation = getattr(theirs, "act_fn", None)
    if getattr(activation, "__name__", type(activation).__name__) not in SILU:
        yield "their activation is not SiLU"
    sizes = {"n_routed_experts": len(theirs.gate_up_proj), "moe_intermediate_size": theirs.down_proj.shape[2]}
    sizes |= {"hidden_size": theirs.down_proj.shape[1]}
    for key, size in sizes.items():
        if size != getattr(spec, key):
            yield f"their {key} is {size}, and config gives {getattr(spec, key)}"


def _biases(layer: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for module in layer.modules():
        for name in BIASES:
            if isinstance(getattr(module, name, None), Tensor):
                yield module, name
