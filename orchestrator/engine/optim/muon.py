"""Muon (https://kellerjordan.github.io/posts/muon/): the momentum of a matrix, made orthogonal.

All in fp32, and in memory of its own: products of matrices may have other bits where their operands begin at another
alignment. The scale is that of arXiv:2502.16982, by which learning rate and weight decay are those of AdamW.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from orchestrator.elastic.state_spec import MOMENTUM
from orchestrator.engine.optim.rule import UpdateInfo
from orchestrator.spec.optimizer import OptimizerSpec

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
RMS_OF_ADAMW = 0.2  # root mean square of its updates, about
TINY = 1e-7


class Muon:
    """m = momentum m + (1 - momentum) g; w -= lr 0.2 sqrt(max(rows, columns)) orthogonal(g + momentum (m - g)) with
    Nesterov's look ahead, else orthogonal(m)."""

    def __init__(self, spec: OptimizerSpec) -> None:
        self._momentum, self._is_nesterov = spec.momentum, spec.nesterov

    def update(self, master: Tensor, grad: Tensor, state: Mapping[str, Tensor], at: UpdateInfo) -> None:
        momentum = state[MOMENTUM].mul_(self._momentum).add_(grad * (1.0 - self._momentum))
        ahead = momentum * self._momentum + grad * (1.0 - self._momentum) if self._is_nesterov else momentum
        master.sub_(orthogonal(ahead).mul_(at.lr * RMS_OF_ADAMW * max(master.shape) ** 0.5))


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest matrix with singular values near 1, by Newton-Schulz iterations of fifth degree, fp32."""
    a, b, c = COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x_RC = (matrix.t() if is_tall else matrix).clone(memory_format=torch.contiguous_format)
    x_RC.div_(x_RC.norm() + TINY)
    for _ in range(ITERATIONS):
        square_RR = x_RC @ x_RC.t()
        factor_RR = square_RR * b + (square_RR @ square_RR) * c
        x_RC = x_RC * a + factor_RR @ x_RC
    return x_RC.t().contiguous() if is_tall else x_RC
