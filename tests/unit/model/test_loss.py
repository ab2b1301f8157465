"""The chunked cross-entropy against the plain one: values, gradients, and what it holds."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from orchestrator.model.loss import IGNORED, cross_entropy, cross_entropy_sum
from tests.support import devices

pytestmark = pytest.mark.usefixtures("device")

N, D, V = 50, 12, 40


def _case(dtype: torch.dtype = torch.float64, tokens: int = N) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    device = devices.device()
    x_ND = torch.randn(tokens, D, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()
    head_VD = torch.randn(V, D, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()
    targets_N = torch.randint(0, V, (tokens,), generator=generator).to(device)
    targets_N[::7] = IGNORED
    return x_ND, head_VD, targets_N


def _plain(x_ND: Tensor, head_VD: Tensor, targets_N: Tensor) -> Tensor:
    logits_NV = F.linear(x_ND, head_VD).float()
    return F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORED, reduction="sum")


@pytest.mark.parametrize("chunk", [1, 7, 50, 64, None])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_loss_and_gradients_equal_the_plain_form(chunk: int | None, dtype: torch.dtype, tolerance: float) -> None:
    found, wanted = _case(dtype), _case(dtype)
    loss, plain = cross_entropy_sum(*found, chunk), _plain(*wanted)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain, rtol=tolerance, atol=0.0)
    (loss / 3).backward()
    (plain / 3).backward()
    for ours, theirs in zip(found[:2], wanted[:2], strict=True):
        assert ours.grad is not None and ours.grad.dtype == dtype
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("chunk", [1, 7, 50, 64, None])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_losses_of_tokens_may_be_weighted_by_what_depends_on_them(
    chunk: int | None, dtype: torch.dtype, tolerance: float
) -> None:
    found, wanted = _case(dtype), _case(dtype)
    ours_N = cross_entropy(*found, chunk)
    logits_NV = F.linear(wanted[0], wanted[1]).float()
    theirs_N = F.cross_entropy(logits_NV, wanted[2], ignore_index=IGNORED, reduction="none")
    torch.testing.assert_close(ours_N, theirs_N, rtol=tolerance, atol=1e-6)
    for loss_N in (ours_N, theirs_N):
        (loss_N * torch.sigmoid(loss_N)).sum().backward()
    for ours, theirs in zip(found[:2], wanted[:2], strict=True):
        assert ours.grad is not None and ours.grad.dtype == dtype
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=tolerance, atol=tolerance)


def test_no_tokens_and_no_targets_have_no_loss_but_gradients() -> None:
    for x_ND, head_VD, targets_N in (_case(torch.float32, 0), _case(torch.float32)):
        loss = cross_entropy_sum(x_ND, head_VD, torch.full_like(targets_N, IGNORED))
        loss.backward()
        assert loss.item() == 0.0
        assert x_ND.grad is not None and head_VD.grad is not None
        assert not x_ND.grad.any() and not head_VD.grad.any()


def test_large_logits_do_not_overflow() -> None:
    x_ND, head_VD, targets_N = _case(torch.float32)
    assert torch.isfinite(cross_entropy_sum(x_ND * 1e4, head_VD, targets_N))


def test_nothing_is_computed_for_backward_where_no_gradient_is_needed() -> None:
    with torch.no_grad():
        loss = cross_entropy_sum(*_case(torch.float32))
    assert not loss.requires_grad
