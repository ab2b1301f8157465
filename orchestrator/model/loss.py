"""Losses over a large vocabulary that never hold all logits.

The logits of one chunk of tokens at a time are computed, reduced to their loss and gradients, and dropped, all in the
forward pass: the same three matrix products as in the plain form, and memory for a chunk instead of for all tokens (the
idea of Liger Kernel's fused linear cross-entropy, arXiv:2410.10989, section 3.2, with plain products). The backward
pass only scales these gradients.

Shape legend: N = tokens, C = tokens of a chunk, D = hidden size, V = vocabulary, S = sums.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # target of a position that has no loss
CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}  # logits held at once: 16 MB in fp32 suit a CPU's caches
MIN_CHUNK = 64  # fewer tokens make poor matrix products


class LogitLoss(Protocol):
    """A loss of tokens by their logits, computed for a chunk of them at a time.

    Attributes:
        num_sums: S.
        num_held: tensors (C, V) in fp32 that it holds at once, the logits among them: a chunk is as much smaller.
    """

    @property
    def num_sums(self) -> int: ...

    @property
    def num_held(self) -> int: ...

    def __call__(self, logits_CV: Tensor, here: slice, wants_gradient: bool) -> tuple[Tensor, Tensor | None]:
        """The loss of the tokens `here`.

        Args:
            logits_CV: in fp32; may be overwritten.

        Returns:
            sums_S: fp32. The first is the loss, others are for reports.
            d_CV: its gradient with respect to the logits, if wanted.
        """
        ...


def chunked_loss(
    x_ND: Tensor, head_VD: Tensor | None, loss: LogitLoss, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """A loss, summed over the tokens.

    Args:
        x_ND: final hidden states.
        head_VD: the output matrix, in the same precision. Logits are computed in it and then converted to fp32. None:
            `x_ND` are the logits.
        chunk: C; None for a size that suits the vocabulary and the device.

    Returns:
        the loss, and all its sums (S,), without gradients.
    """
    chunk = chunk or _chunk_of(x_ND, head_VD, loss.num_held)
    found: tuple[Tensor, Tensor] = _ChunkedLoss.apply(x_ND, head_VD, loss, chunk)  # type: ignore[no-untyped-call]
    return found


def cross_entropy_sum(x_ND: Tensor, head_VD: Tensor | None, targets_N: Tensor, chunk: int | None = None) -> Tensor:
    """Sum of the cross-entropy over the tokens whose target isn't `IGNORED`, in nats, fp32. Other arguments as of
    `chunked_loss`.

    Args:
        targets_N: token ids, or `IGNORED`.
    """
    return chunked_loss(x_ND, head_VD, CrossEntropy(targets_N), chunk)[0]


@dataclass(frozen=True)
class CrossEntropy:
    """The cross-entropy with token ids, in nats (`LogitLoss`).

    Args:
        targets_N: token ids, or `IGNORED`.
    """

    targets_N: Tensor
    num_sums: int = 1
    num_held: int = 1

    def __call__(self, logits_CV: Tensor, here: slice, wants_gradient: bool) -> tuple[Tensor, Tensor | None]:
        targets_C = self.targets_N[here]
        counted_C1 = (targets_C != IGNORED)[:, None]
        index_C1 = targets_C.clamp_min(0)[:, None]
        # In place in the logits' memory, with one exponential for the loss and its gradient.
        logits_CV.sub_(logits_CV.amax(-1, keepdim=True))
        target_C1 = logits_CV.gather(1, index_C1)
        exp_CV = logits_CV.exp_()
        sum_C1 = exp_CV.sum(-1, keepdim=True)
        sums_1 = ((sum_C1.log() - target_C1) * counted_C1).sum().view(1)
        if not wants_gradient:
            return sums_1, None
        # Gradient of the loss with respect to the logits: softmax minus one at the target.
        d_CV = exp_CV.mul_(counted_C1 / sum_C1)
        return sums_1, d_CV.scatter_add_(1, index_C1, -counted_C1.float())


@dataclass(frozen=True)
class JointLoss:
    """A loss of several hidden states of the same tokens, one state's tokens after the other's (`LogitLoss`). Its value
    is that of the first state; its gradients are those of all states' losses times their weights. Sums: those of the
    loss for each state.

    Args:
        weights: of the states.
        num_tokens: N of a state.
    """

    loss: LogitLoss
    weights: tuple[float, ...]
    num_tokens: int

    @property
    def num_sums(self) -> int:
        return len(self.weights) * self.loss.num_sums

    @property
    def num_held(self) -> int:
        return self.loss.num_held

    def __call__(self, logits_CV: Tensor, here: slice, wants_gradient: bool) -> tuple[Tensor, Tensor | None]:
        N, stop = self.num_tokens, here.start + len(logits_CV)
        sums_WS = torch.zeros(len(self.weights), self.loss.num_sums, device=logits_CV.device)
        for index in range(here.start // N, -(-stop // N)):  # a chunk may have tokens of several states
            first, last = max(here.start, index * N), min(stop, (index + 1) * N)
            part = slice(first - here.start, last - here.start)
            in_state = slice(first - index * N, last - index * N)
            sums_WS[index], d_PV = self.loss(logits_CV[part], in_state, wants_gradient)
            if d_PV is None:
                continue
            if self.weights[index] != 1.0:
                d_PV = d_PV.mul_(self.weights[index])
            logits_CV[part] = d_PV  # which may be that memory already
        return sums_WS.flatten(), logits_CV if wants_gradient else None


def cross_entropy(x_ND: Tensor, head_VD: Tensor, targets_N: Tensor, chunk: int | None = None) -> Tensor:
    """The cross-entropy (N,) of each token in nats, fp32; 0 where the target is `IGNORED`. Arguments as of
    `cross_entropy_sum`.

    Losses may be weighted by what depends on them, so the backward pass computes the logits of each chunk again: four
    matrix products instead of three.
    """
    loss_N: Tensor = _TokenCrossEntropy.apply(x_ND, head_VD, targets_N, chunk or _chunk_of(x_ND, head_VD))  # type: ignore[no-untyped-call]
    return loss_N


def _chunk_of(x_ND: Tensor, head_VD: Tensor | None, num_held: int = 1) -> int:
    elements = CHUNK_ELEMENTS.get(x_ND.device.type, CHUNK_ELEMENTS["cuda"])
    return max(MIN_CHUNK, elements // num_held // (x_ND.shape[1] if head_VD is None else head_VD.shape[0]))


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, head_VD: Tensor | None, loss: LogitLoss, chunk: int) -> tuple[Tensor, Tensor]:
        wants_gradients, trains_head = any(ctx.needs_input_grad[:2]), ctx.needs_input_grad[1]
        sums_S = torch.zeros(loss.num_sums, dtype=torch.float32, device=x_ND.device)
        grad_ND = torch.empty_like(x_ND) if wants_gradients else None
        grad_VD = torch.zeros_like(head_VD, dtype=torch.float32) if head_VD is not None and trains_head else None
        for start in range(0, len(x_ND), chunk):
            here = slice(start, start + chunk)
            x_CD = x_ND[here]
            # In memory that the loss may overwrite.
            logits_CV = x_CD.to(torch.float32, copy=True) if head_VD is None else F.linear(x_CD, head_VD).float()
            of_chunk_S, d_CV = loss(logits_CV, here, wants_gradients)
            sums_S += of_chunk_S
            if grad_ND is None or d_CV is None:
                continue
            d_CV = d_CV.to(x_ND.dtype)
            if head_VD is None:
                grad_ND[here] = d_CV
                continue
            torch.mm(d_CV, head_VD, out=grad_ND[here])
            if grad_VD is None:
                continue
            if grad_VD.dtype == d_CV.dtype:
                grad_VD.addmm_(d_CV.T, x_CD)
            else:
                grad_VD += torch.mm(d_CV.T, x_CD)
        ctx.save_for_backward(grad_ND, grad_VD)
        ctx.head_dtype = None if head_VD is None else head_VD.dtype
        ctx.mark_non_differentiable(sums_S)
        return sums_S[0].clone(), sums_S

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        grad, _ = grads
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
