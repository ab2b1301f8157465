"""Lion (arXiv:2302.06675): the sign of a momentum."""

from collections.abc import Mapping

from torch import Tensor

from orchestrator.elastic.state_spec import EXP_AVG
from orchestrator.engine.optim.rule import UpdateInfo
from orchestrator.spec.optimizer import OptimizerSpec


class Lion:
    """w -= lr sign(b1 m + (1 - b1) g), then m = b2 m + (1 - b2) g."""

    def __init__(self, spec: OptimizerSpec) -> None:
        self._of_update, self._of_momentum = spec.betas

    def update(self, master: Tensor, grad: Tensor, state: Mapping[str, Tensor], at: UpdateInfo) -> None:
        momentum = state[EXP_AVG]
        direction = (momentum * self._of_update).add_(grad * (1.0 - self._of_update)).sign_()
        master.sub_(direction.mul_(at.lr))
        momentum.mul_(self._of_momentum).add_(grad * (1.0 - self._of_momentum))
