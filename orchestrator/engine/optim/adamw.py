"""AdamW (arXiv:1711.05101), by torch's fused kernel.

The kernel is elementwise, but on a CPU it takes 64 bytes at once, and the remainder at the end of a tensor one by one,
with other roundings. So there is never a remainder: partitions are multiples of `PIECE_MULTIPLE`, and so are pieces
of a replay.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from orchestrator.elastic.state_spec import EXP_AVG, EXP_AVG_SQ
from orchestrator.engine.optim.rule import UpdateInfo
from orchestrator.spec.optimizer import OptimizerSpec


class AdamW:
    """m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2; w -= lr m^ / (sqrt(v^) + eps), m^ and v^ corrected for their
    beginning at zero. Calls the kernel itself: torch's own optimizer would load torch's compiler, which takes a
    starting worker a second."""

    def __init__(self, spec: OptimizerSpec) -> None:
        self._spec = spec

    def update(self, master: Tensor, grad: Tensor, state: Mapping[str, Tensor], at: UpdateInfo) -> None:
        adamw(
            [master],
            [grad],
            [state[EXP_AVG]],
            [state[EXP_AVG_SQ]],
            [],
            [torch.full((), float(at.number - 1), device=master.device)],  # the kernel counts it up, on the device
            fused=True,
            amsgrad=False,
            maximize=False,
            beta1=self._spec.betas[0],
            beta2=self._spec.betas[1],
            lr=at.lr,
            weight_decay=0.0,
            eps=self._spec.eps,
        )
