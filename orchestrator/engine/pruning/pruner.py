"""What an update prunes: decided from whole parameters, which every rank that updates a part of them has.

So each rank decides for itself, and all decide the same. No mask is kept: a weight is pruned if it is exactly zero
after the first update that prunes (`engine.optim.stepper.Updates`), so that rescales, snapshots and checkpoints move
and keep what is pruned as they do all weights.
"""

import torch
from torch import Tensor

from orchestrator.engine.pruning.masks import smallest, smallest_of_four, weakest_units
from orchestrator.model.base import TrainableModel
from orchestrator.model.linear.products import LinearProducts
from orchestrator.model.linear.structure import Structure, UnitSlices
from orchestrator.spec.pruning import TWO_OF_FOUR, PruneTargetSpec, PruningSpec


class Pruner:
    """Decides for one rank's model.

    Args:
        model: with this rank's experts.
    """

    def __init__(self, model: TrainableModel, pruning: PruningSpec) -> None:
        self._pruning, self._number = pruning, 0
        self._params = dict(model.named_parameters())
        self._structures: dict[str, tuple[str, Structure, UnitSlices]] = {}  # by parameter, with the module's name
        self._units: dict[tuple[str, str], Tensor] = {}  # pruned, by module and pattern
        for prefix, module in model.named_modules():
            for structure in module.structures() if isinstance(module, LinearProducts) else ():
                for part in structure.parts:
                    self._structures[f"{prefix}.{part.name}"] = (prefix, structure, part)

    def begin(self, number: int) -> None:
        """Decide on the units that an update, counted from 1, prunes. Parameters may only change after that."""
        self._number = number
        for name, (prefix, structure, _) in self._structures.items():
            target = self._target(name)
            if target is not None and target.is_structured and (prefix, structure.pattern) not in self._units:
                self._units[prefix, structure.pattern] = self._weakest(prefix, structure, target)

    def end(self) -> None:
        """Free what was decided."""
        self._units.clear()

    @torch.no_grad()
    def pruned(self, name: str) -> Tensor:
        """Which elements of a parameter the update prunes, flat, bool. The parameter must be as it was at `begin`."""
        param, target = self._params[name], self._target(name)
        assert target is not None, f"{name} isn't pruned"
        if target.is_structured:
            prefix, structure, part = self._structures[name]
            pruned_U = self._units[prefix, structure.pattern]
            found = torch.zeros_like(param, dtype=torch.bool)
            part.by_unit(found, structure.num_units).copy_(pruned_U[None, :, None])
            return found.view(-1)
        count, weights = target.count(param.numel(), self._pruning.progress(self._number)), self.judged(name)
        if target.pattern == TWO_OF_FOUR:
            return smallest_of_four(weights, count)
        return smallest(weights.abs().view(-1), count)

    def judged(self, name: str) -> Tensor:
        """The weights by whose magnitudes is decided what of a parameter is pruned."""
        return self._params[name].detach()

    def _target(self, name: str) -> PruneTargetSpec | None:
        return self._pruning.target_of(name, self._params[name].shape)

    @torch.no_grad()
    def _weakest(self, prefix: str, structure: Structure, target: PruneTargetSpec) -> Tensor:
        progress = self._pruning.progress(self._number)
        count = structure.multiple * target.count(structure.num_units // structure.multiple, progress)
        parts = []
        for part in structure.parts:
            parts.append(part.by_unit(self.judged(f"{prefix}.{part.name}"), structure.num_units))
        return weakest_units(parts, count)
