"""References for update rules: torch's own optimizers, or formulas of their papers.

Weight decay is decoupled in all.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

BETAS, EPS, MOMENTUM = (0.9, 0.95), 1e-8, 0.95

Reference = Callable[[Tensor, Sequence[Tensor], float, float], Tensor]
"""Weights after updates by all gradients, from their first values, a learning rate and a weight decay. fp32."""


def _by_torch(make: Callable[[list[Tensor], float], torch.optim.Optimizer]) -> Reference:
    def trained(values: Tensor, gradients: Sequence[Tensor], lr: float, weight_decay: float) -> Tensor:
        weight = torch.nn.Parameter(values.clone())
        optimizer = make([weight], lr)
        for gradient in gradients:
            with torch.no_grad():
                weight.mul_(1.0 - lr * weight_decay)
            weight.grad = gradient.clone()
            optimizer.step()
        return weight.detach()

    return trained


def lion(values: Tensor, gradients: Sequence[Tensor], lr: float, weight_decay: float) -> Tensor:
    """Algorithm 2 of arXiv:2302.06675, in fp32 as its authors' code: in fp64 other signs come out near 0, of some 8 in
    a million elements over 50 steps."""
    weight, momentum = values.clone(), torch.zeros_like(values)
    for gradient in gradients:
        weight.mul_(1.0 - lr * weight_decay)
        weight.add_(momentum.mul(BETAS[0]).add(gradient, alpha=1 - BETAS[0]).sign_(), alpha=-lr)
        momentum.mul_(BETAS[1]).add_(gradient, alpha=1 - BETAS[1])
    return weight


def muon(values: Tensor, gradients: Sequence[Tensor], lr: float, weight_decay: float) -> Tensor:
    """With Newton-Schulz iterations in fp64."""
    weight, momentum = values.double(), torch.zeros_like(values).double()
    for gradient in (g.double() for g in gradients):
        weight = weight * (1.0 - lr * weight_decay)
        momentum = MOMENTUM * momentum + (1 - MOMENTUM) * gradient
        x = MOMENTUM * momentum + (1 - MOMENTUM) * gradient
        is_tall = x.shape[0] > x.shape[1]
        x = x.t() if is_tall else x
        x = x / (x.norm() + 1e-7)
        for _ in range(5):
            a = x @ x.t()
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        weight = weight - lr * 0.2 * max(weight.shape) ** 0.5 * (x.t() if is_tall else x)
    return weight.float()


REFERENCES: dict[str, Reference] = {
    "adamw": _by_torch(lambda p, lr: torch.optim.AdamW(p, lr, BETAS, EPS, weight_decay=0.0)),
    "sgd": _by_torch(lambda p, lr: torch.optim.SGD(p, lr, momentum=MOMENTUM, nesterov=True)),
    "lion": lion,
    "muon": muon,
    "adafactor": _by_torch(lambda p, lr: torch.optim.Adafactor(p, lr)),
}
TORCH_MUON = _by_torch(  # its iterations are in bf16
    lambda p, lr: torch.optim.Muon(p, lr, weight_decay=0.0, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw")
)
