"""Update rules: how gradients change a parameter, and what is kept for that between steps.

A rule is a file here, an entry in `orchestrator.engine.optim.all_rules`, its name in `orchestrator.spec.optimizer` (and
in `USED_BY` and `OF_MATRICES` there, where it belongs), and the kinds of its state in
`orchestrator.elastic.state_spec`, with their shape in `ParamSpec.shape_of` if it isn't the parameter's, which only a
rule of matrices may have. All else (buckets, snapshots and their replay, rescales,
checkpoints, memory plans) follows from those.

An element's update must have the same bits wherever its partition begins and ends, as a rescale cuts them otherwise.
Multiplications, additions, divisions and roots, each rounded for itself, have them; kernels that may fuse a product and
a sum (`add_(alpha=)`, `addcmul_`, `lerp_`) need not. A rule of matrices gets each of them whole, in the same shape.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class UpdateInfo:
    """
    Args:
        number: of the update, counted from 1.
        lr: learning rate of the parameters.
    """

    number: int
    lr: float


class UpdateRule(Protocol):
    """Updates parameters in place."""

    def update(self, master: Tensor, grad: Tensor, state: Mapping[str, Tensor], at: UpdateInfo) -> None:
        """
        Args:
            master: weights in fp32, after weight decay; a flat piece, or a whole matrix for a rule of matrices.
            grad: of the same shape, clipped; not modified.
            state: by kind, each of the same shape, or a flat tensor of the kind's own size.
        """
        ...


def decay(master: Tensor, lr: float, weight_decay: float) -> None:
    """Decoupled weight decay (arXiv:1711.05101), apart from the update, as parameters of one partition may differ in
    it."""
    if weight_decay:
        master.mul_(1.0 - lr * weight_decay)
