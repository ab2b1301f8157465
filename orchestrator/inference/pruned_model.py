"""Models without the neurons and heads that training has pruned: smaller matrices, and the same function."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from orchestrator.model.factory import build_model
from orchestrator.model.linear.products import LinearProducts
from orchestrator.model.linear.structure import Structure
from orchestrator.model.moe.expert_parallel import ExpertParallelContext
from orchestrator.model.transformer import MoELanguageModel
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.pruning import HEADS, NEURONS


class _Found(NamedTuple):
    """A structure of a module: the module's name, and which units have no weight but zeros, bool (U,)."""

    prefix: str
    module: LinearProducts
    structure: Structure
    is_empty_U: Tensor

    @property
    def width(self) -> tuple[str, int]:
        """What all modules have in common whose sizes are one key of the model's section."""
        return self.structure.pattern, self.structure.num_units // self.structure.multiple

    @property
    def num_removable(self) -> int:
        return int(self.is_empty_U.sum()) // self.structure.multiple


@torch.no_grad()
def without_pruned_units(model: MoELanguageModel, home: ExpertParallelContext) -> MoELanguageModel:
    """The model without units whose weights are all zero; itself if there are none. As many leave each module of equal
    width, so that the result is of one `ModelSpec` again.

    Args:
        model: whole.
        home: of its experts.
    """
    found = list(_found(model))
    removable: dict[tuple[str, int], int] = {}
    for each in found:
        removable[each.width] = min(removable.get(each.width, each.num_removable), each.num_removable)
    spec = _smaller(model.spec, removable)
    if spec == model.spec:
        return model
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    for each in found:
        num_left = each.structure.num_units - each.structure.multiple * removable[each.width]
        tensors |= _without(each, num_left)
    with model.head.device:
        smaller = build_model(spec, len(model.head), home)
    for name, param in smaller.named_parameters():
        param.data = tensors[name].data
    buffers = dict(model.state_buffers())
    for name, buffer in smaller.state_buffers():
        buffer.copy_(buffers[name])
    assert isinstance(smaller, MoELanguageModel)
    return smaller.train(model.training)


def _found(model: MoELanguageModel) -> Iterator[_Found]:
    for prefix, module in model.named_modules():
        for structure in module.structures() if isinstance(module, LinearProducts) else ():
            is_empty_U = torch.ones(structure.num_units, dtype=torch.bool, device=model.head.device)
            for part in structure.parts:
                is_empty_U &= (part.by_unit(getattr(module, part.name), structure.num_units) == 0).all(2).all(0)
            yield _Found(prefix, module, structure, is_empty_U)


def _smaller(spec: ModelSpec, removable: Mapping[tuple[str, int], int]) -> ModelSpec:
    """The sizes that are left. The width of a head stays as it is."""
    heads = spec.num_key_value_heads if spec.kv_lora_rank is None else spec.num_attention_heads
    num_heads, each = removable.get((HEADS, heads), 0), spec.num_attention_heads // heads
    changes = {
        "intermediate_size": spec.intermediate_size - removable.get((NEURONS, spec.intermediate_size), 0),
        "moe_intermediate_size": spec.moe_intermediate_size - removable.get((NEURONS, spec.moe_intermediate_size), 0),
        "num_attention_heads": spec.num_attention_heads - num_heads * each,
        "num_key_value_heads": heads - num_heads,  # of latent attention as many as heads, as in transformers
        "head_dim": spec.head_dim,
    }
    return spec if not any(removable.values()) else spec.model_copy(update=changes)


def _without(each: _Found, num_left: int) -> dict[str, Tensor]:
    """Parameters of a module with so many of its units, by their names in the model. The first empty ones leave it."""
    empty = each.is_empty_U.nonzero().flatten().tolist()[: each.structure.num_units - num_left]
    leaving = set(empty)
    kept = [unit for unit in range(each.structure.num_units) if unit not in leaving]
    kept_U = torch.tensor(kept, device=each.is_empty_U.device)
    return {
        f"{each.prefix}.{part.name}": part.without(getattr(each.module, part.name), each.structure.num_units, kept_U)
        for part in (*each.structure.parts, *each.structure.biases)
    }
