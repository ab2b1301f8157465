"""Cross-entropy over a large vocabulary that never holds all logits.

The logits of one chunk of tokens at a time are computed, reduced to their loss and gradients, and dropped, all in the
forward pass: the same three matrix products as in the plain form, and memory for a chunk instead of for all tokens (the
idea of Liger Kernel's fused linear cross-entropy, arXiv:2410.10989, section 3.2, with plain products). The backward
pass only scales these gradients.

Shape legend: N = tokens, C = tokens of a chunk, D = hidden size, V = vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # target of a position that has no loss
CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}  # logits held at once: 16 MB in fp32 suit a CPU's caches
MIN_CHUNK = 64  # fewer tokens make poor matrix products


def cross_entropy_sum(x_ND: Tensor, head_VD: Tensor, targets_N: Tensor, chunk: int | None = None) -> Tensor:
    """Sum of the cross-entropy over the tokens whose target isn't `IGNORED`, in nats, fp32.

    Args:
        x_ND: final hidden states.
        head_VD: the output matrix, in the same precision. Logits are computed in it and then converted to fp32.
        targets_N: token ids, or `IGNORED`.
        chunk: C; None for a size that suits the vocabulary and the device.
    """
    loss: Tensor = _ChunkedCrossEntropy.apply(x_ND, head_VD, targets_N, chunk or _chunk_of(x_ND, head_VD))  # type: ignore[no-untyped-call]
    return loss


def cross_entropy(x_ND: Tensor, head_VD: Tensor, targets_N: Tensor, chunk: int | None = None) -> Tensor:
    """The cross-entropy (N,) of each token in nats, fp32; 0 where the target is `IGNORED`. Arguments as of
    `cross_entropy_sum`.

    Losses may be weighted by what depends on them, so the backward pass computes the logits of each chunk again: four
    matrix products instead of three.
    """
    loss_N: Tensor = _TokenCrossEntropy.apply(x_ND, head_VD, targets_N, chunk or _chunk_of(x_ND, head_VD))  # type: ignore[no-untyped-call]
    return loss_N


def _chunk_of(x_ND: Tensor, head_VD: Tensor) -> int:
    elements = CHUNK_ELEMENTS.get(x_ND.device.type, CHUNK_ELEMENTS["cuda"])
    return max(MIN_CHUNK, elements // head_VD.shape[0])


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, head_VD: Tensor, targets_N: Tensor, chunk: int) -> Tensor:
        wants_gradients, trains_head = any(ctx.needs_input_grad[:2]), ctx.needs_input_grad[1]
        loss = torch.zeros((), dtype=torch.float32, device=x_ND.device)
        grad_ND = torch.empty_like(x_ND) if wants_gradients else None
        grad_VD = torch.zeros_like(head_VD, dtype=torch.float32) if trains_head else None
        for start in range(0, len(x_ND), chunk):
            x_CD, targets_C = x_ND[start : start + chunk], targets_N[start : start + chunk]
            logits_CV = F.linear(x_CD, head_VD).float()
            counted_C1 = (targets_C != IGNORED)[:, None]
            index_C1 = targets_C.clamp_min(0)[:, None]
            # In place in the logits' memory, with one exponential for the loss and its gradient.
            logits_CV.sub_(logits_CV.amax(-1, keepdim=True))
            target_C1 = logits_CV.gather(1, index_C1)
            exp_CV = logits_CV.exp_()
            sum_C1 = exp_CV.sum(-1, keepdim=True)
            loss += ((sum_C1.log() - target_C1) * counted_C1).sum()
            if grad_ND is not None:
                # Gradient of the loss with respect to the logits: softmax minus one at the target.
                d_CV = exp_CV.mul_(counted_C1 / sum_C1)
                d_CV.scatter_add_(1, index_C1, -counted_C1.float())
                d_CV = d_CV.to(x_ND.dtype)
                torch.mm(d_CV, head_VD, out=grad_ND[start : start + chunk])
                if grad_VD is None:
                    continue
                if grad_VD.dtype == d_CV.dtype:
                    grad_VD.addmm_(d_CV.T, x_CD)
                else:
                    grad_VD += torch.mm(d_CV.T, x_CD)
        ctx.save_for_backward(grad_ND, grad_VD)
        ctx.head_dtype = head_VD.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (grad,) = grads
        grad_ND, grad_VD = ctx.saved_tensors
        of_head = None if grad_VD is None else (grad_VD * grad).to(ctx.head_dtype)
        return grad_ND * grad.to(grad_ND.dtype), of_head, None, None


class _TokenCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, head_VD: Tensor, targets_N: Tensor, chunk: int) -> Tensor:
        ctx.save_for_backward(x_ND, head_VD, targets_N)
        ctx.chunk = chunk
        loss_N = torch.empty(len(x_ND), dtype=torch.float32, device=x_ND.device)
        for start in range(0, len(x_ND), chunk):
            targets_C = targets_N[start : start + chunk]
            logits_CV = F.linear(x_ND[start : start + chunk], head_VD).float()
            target_C = logits_CV.gather(1, targets_C.clamp_min(0)[:, None])[:, 0]
            loss_N[start : start + chunk] = (logits_CV.logsumexp(-1) - target_C) * (targets_C != IGNORED)
        return loss_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (grad_N,) = grads
        x_ND, head_VD, targets_N = ctx.saved_tensors
        grad_ND = torch.empty_like(x_ND)
        grad_VD = torch.zeros_like(head_VD, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, len(x_ND), ctx.chunk):
            here = slice(start, start + ctx.chunk)
            targets_C = targets_N[here]
            # Gradient with respect to the logits: softmax minus one at the target, times the token's own.
            d_CV = F.linear(x_ND[here], head_VD).float().softmax(-1)
            d_CV.scatter_add_(1, targets_C.clamp_min(0)[:, None], -torch.ones_like(d_CV[:, :1]))
            d_CV = d_CV.mul_((grad_N[here] * (targets_C != IGNORED))[:, None]).to(x_ND.dtype)
            torch.mm(d_CV, head_VD, out=grad_ND[here])
            if grad_VD is not None:
                grad_VD += torch.mm(d_CV.T, x_ND[here])
        return grad_ND, None if grad_VD is None else grad_VD.to(head_VD.dtype), None, None
