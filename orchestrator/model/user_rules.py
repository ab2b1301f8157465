"""Rules that a user's module must meet so that any number of ranks can train it; messages name the violations."""

from collections.abc import Iterator, Sequence

import torch
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from orchestrator.elastic.state_spec import expert_of
from orchestrator.model.base import TrainableModel
from orchestrator.model.moe.expert_parallel import ExpertParallelContext
from orchestrator.model.moe.routed_experts import RoutedExperts

SHOWN = 5  # names in a message; a module with a mistake often has it in each layer


def broken_rules(model: TrainableModel, home: ExpertParallelContext) -> Iterator[str]:
    """The rules that `model` breaks, each with the remedy."""
    yield from _broken_parameter_rules(model)
    yield from _broken_expert_rules(model, home)
    others = [name for name, b in model.state_buffers() if b.dtype is not torch.float32]
    norms = [name for name in others if isinstance(model.get_submodule(name.rpartition(".")[0]), _NormBase)]
    if norms:
        yield (
            f"buffers {shown(norms)} are of running statistics, which a pass changes: ranks see different rows and "
            "would have different ones; use LayerNorm or GroupNorm"
        )
    if buffers := [name for name in others if name not in norms]:
        yield (
            f"buffers {shown(buffers)} are not float32; make those that build computes anew non-persistent, "
            "register_buffer(..., persistent=False), and the others float32"
        )


def _broken_parameter_rules(model: TrainableModel) -> Iterator[str]:
    params = dict(model.named_parameters())
    if not params:
        yield "it has no parameter; a model needs at least one"
    empty = [name for name, p in params.items() if is_lazy(p) or not p.numel()]
    if empty:
        yield f"parameters {shown(empty)} have no elements; give each its shape in build"
    others = [name for name, p in params.items() if p.dtype is not torch.float32]
    if others:
        yield f"parameters {shown(others)} are not float32; build them so, train.precision converts them"
    frozen = [name for name, p in params.items() if not p.requires_grad]
    if frozen:
        yield f"parameters {shown(frozen)} need no gradient; register what isn't trained as a buffer"


def _broken_expert_rules(model: TrainableModel, home: ExpertParallelContext) -> Iterator[str]:
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, RoutedExperts)]
    here = [str(expert) for expert in home.local_experts]
    others = [name for name, layer in layers if [expert for expert, _ in layer.experts.named_children()] != here]
    if others:
        yield f"{shown(others)} must be MoELayer(spec, experts) with the `experts` that build was given"
    placed = {
        name: int(expert)
        for prefix, layer in layers
        for expert, module in layer.experts.named_children()
        for name, _ in module.named_parameters(f"{prefix}.experts.{expert}")
    }
    misnamed = [name for name, _ in model.named_parameters() if expert_of(name) != placed.get(name)]
    if misnamed:
        yield (
            f"parameters {shown(misnamed)} have names of the form *.experts.NUMBER.*, which only those of a MoELayer's "
            "experts may have; rename the attribute"
        )


def shown(names: Sequence[str]) -> str:
    """Names for a message, without the wrapper's prefix."""
    own = [name.removeprefix("model.") for name in names]
    more = f" and {len(own) - SHOWN} more" if len(own) > SHOWN else ""
    return ", ".join(own[:SHOWN]) + more
