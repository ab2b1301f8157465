"""Stochastic gradient descent with momentum (Sutskever et al., 2013), as `torch.optim.SGD`."""

from collections.abc import Mapping

from torch import Tensor

from orchestrator.elastic.state_spec import MOMENTUM
from orchestrator.engine.optim.rule import UpdateInfo
from orchestrator.spec.optimizer import OptimizerSpec


class SGD:
    """m = momentum m + g; w -= lr (g + momentum m) with Nesterov's look ahead, else w -= lr m."""

    def __init__(self, spec: OptimizerSpec) -> None:
        self._momentum, self._is_nesterov = spec.momentum, spec.nesterov

    def update(self, master: Tensor, grad: Tensor, state: Mapping[str, Tensor], at: UpdateInfo) -> None:
        momentum = state[MOMENTUM].mul_(self._momentum).add_(grad)
        change = (momentum * self._momentum).add_(grad) if self._is_nesterov else momentum
        master.sub_(change * at.lr)
