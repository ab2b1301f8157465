"""The optimizer that DeepSpeed steps: update rules on the partitions of one rank."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from orchestrator.elastic.state_spec import EMA, OF_RULE, ParamSpec
from orchestrator.engine.base import noop
from orchestrator.engine.optim.all_rules import RULES
from orchestrator.engine.optim.rule import UpdateInfo, UpdateRule, decay
from orchestrator.spec.optimizer import OptimizerSpec
from orchestrator.spec.train import TrainSpec


@dataclass(frozen=True)
class ParamPart:
    """Elements of a parameter within a flat tensor.

    Args:
        here: where they are in it.
        start: the first one's position in the parameter.
    """

    param: ParamSpec
    here: slice
    start: int = 0


def places(kind: str, parts: Sequence[ParamPart]) -> list[slice]:
    """Where a kind of state of these parts is in its flat tensor: as the parts are in theirs, or end to end where it
    has another size."""
    sizes = [math.prod(part.param.shape_of(kind)) for part in parts]
    if all(size == part.param.numel for size, part in zip(sizes, parts, strict=True)):
        return [part.here for part in parts]
    ends = list(accumulate(sizes))
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


Pruned = Callable[[str], Tensor]  # which elements of the parameter of this name an update prunes, flat


class Updates:
    """Applies updates to flat tensors.

    Args:
        train: rules, what is pruned, and the average of weights.
    """

    def __init__(self, train: TrainSpec) -> None:
        self._spec, self._rules, self._pruning = train.optimizer, _rules_of(train.optimizer), train.pruning
        self._ema = None if train.ema is None else train.ema.decay

    def kinds(self, rule: str) -> tuple[str, ...]:
        """Kinds of state that an update of these parameters changes."""
        return OF_RULE[rule] if self._ema is None else (*OF_RULE[rule], EMA)

    def apply(
        self,
        parts: Sequence[ParamPart],
        master: Tensor,
        grad: Tensor,
        state: Mapping[str, Tensor],
        at: UpdateInfo,
        pruned: Pruned | None = None,
    ) -> None:
        """Update a flat tensor in place.

        Args:
            parts: what it holds, all of the same rule and learning rate; the rest of it is filler.
            grad: like it.
            state: by kind, each as `places` has it.
            at: with the job's learning rate.
            pruned: for an update that prunes.

        Raises:
            ValueError: it prunes, and `pruned` isn't known: such an update can't be replayed.
        """
        if not parts:
            return
        zeros = self._zeros(parts, master, at.number, pruned)
        name, lr_scale = parts[0].param.update
        at = UpdateInfo(at.number, at.lr * lr_scale)
        for here, weight_decay in _runs(parts):
            decay(master[here], at.lr, weight_decay)
        rule = self._rules[name]
        if not parts[0].param.is_whole:
            rule.update(master, grad, state, at)
        kept = {kind: (state[kind], places(kind, parts)) for kind in OF_RULE[name]}
        for index, part in enumerate(parts if parts[0].param.is_whole else ()):
            blocks = {kind: _blocks(tensor[where[index]], kind, part.param) for kind, (tensor, where) in kept.items()}
            for number, (of_master, of_grad) in enumerate(
                zip(_matrices(master, part), _matrices(grad, part), strict=True)
            ):
                rule.update(of_master, of_grad, {kind: found[number] for kind, found in blocks.items()}, at)
        for here, is_zero in zeros:
            master[here].masked_fill_(is_zero, 0.0)
        if self._ema is not None:
            state[EMA].mul_(self._ema).add_(master * (1.0 - self._ema))
            for here, is_zero in zeros:
                state[EMA][here].masked_fill_(is_zero, 0.0)

    def _zeros(
        self, parts: Sequence[ParamPart], master: Tensor, number: int, pruned: Pruned | None
    ) -> list[tuple[slice, Tensor]]:
        """Which elements of each pruned part are zero after the update: those that it prunes, or, as they then stay so,
        those that are."""
        pruning = self._pruning
        if pruning is None:
            return []
        if not pruning.is_due(number):
            is_pruned = [part.here for part in parts if part.param.is_pruned and pruning.has_begun(number)]
            return [(here, master[here] == 0) for here in is_pruned]
        if pruned is None:
            raise ValueError(f"update {number} prunes; what it prunes must be known")
        found = []
        for part in (part for part in parts if part.param.is_pruned):
            length = part.here.stop - part.here.start
            found.append((part.here, pruned(part.param.name)[part.start : part.start + length]))
        return found


def _rules_of(spec: OptimizerSpec) -> dict[str, UpdateRule]:
    return {name: make(spec) for name, make in RULES.items()}


def _runs(parts: Sequence[ParamPart]) -> list[tuple[slice, float]]:
    """Elements by weight decay, neighbours of equal decay together."""
    runs: list[tuple[slice, float]] = []
    for part in parts:
        if runs and runs[-1][1] == part.param.weight_decay:
            runs[-1] = (slice(runs[-1][0].start, part.here.stop), runs[-1][1])
        else:
            runs.append((part.here, part.param.weight_decay))
    return runs


def _matrices(flat: Tensor, part: ParamPart) -> tuple[Tensor, ...]:
    """The matrices of a parameter that lies whole in a flat tensor."""
    whole = flat[part.here].view(part.param.shape)
    return whole.chunk(part.param.blocks) if part.param.blocks > 1 else (whole,)


def _blocks(flat: Tensor, kind: str, param: ParamSpec) -> tuple[Tensor, ...]:
    """What a rule keeps of each of a parameter's blocks."""
    kept = flat.view(param.shape_of(kind))
    return (kept,) if param.blocks == 1 else kept.chunk(param.blocks)


class Stepper(torch.optim.Optimizer):
    """Calls back when an update begins, and keeps its gradients if requested. DeepSpeed steps it once for each group.

    Attributes:
        parts: content of each partition, by id of its tensor; set before the first step, as is the state.
        at: of the next update.
        gradients: by id of the updated tensor, clipped; None: not wanted.
        pruned: what the next update prunes; None: nothing.
    """

    pruned: Pruned | None = None
    before_update: Callable[[], None] = staticmethod(noop)
    gradients: dict[int, Tensor] | None = None

    def __init__(self, params: list[dict[str, Any]], train: TrainSpec) -> None:
        super().__init__(params, {"lr": train.lr})
        self.parts: dict[int, Sequence[ParamPart]] = {}
        self.at = UpdateInfo(1, train.lr)
        self._updates = Updates(train)

    def empty_state(self, group: int, master: Tensor) -> dict[str, Tensor]:
        """Memory for the state of a group's partition, by kind."""
        found, parts = {}, self.parts[id(master)]
        for kind in self._updates.kinds(self.param_groups[group]["update"][0]):
            where = places(kind, parts)
            is_like = where == [part.here for part in parts]
            found[kind] = torch.empty_like(master) if is_like else master.detach().new_empty(where[-1].stop)
        return found

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        callback, self.before_update = self.before_update, noop
        callback()
        for master in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            if self.gradients is not None:
                self.gradients[id(master)] = master.grad
            parts, state = self.parts[id(master)], self.state[master]
            self._updates.apply(parts, master, master.grad, state, self.at, self.pruned)
