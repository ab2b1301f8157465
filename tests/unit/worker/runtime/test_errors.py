"""Kinds of errors, also of those that pass through the user's code."""

import pytest
import torch

from orchestrator.errors import EntrypointError
from orchestrator.user_code import calling_user
from orchestrator.worker.runtime.errors import AbortedGeneration, SumNotProven, kind_of

LOST = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Connection reset by peer")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (LOST, "peer_lost"),
        (AbortedGeneration("generation 3"), "peer_lost"),
        (SumNotProven("a sum"), "peer_lost"),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), "corrupted"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory"),
        (ValueError("a batch of 3"), "user_error"),
        (EntrypointError("returned a mean"), "user_error"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_an_error_that_users_code_passes_on_keeps_its_kind(error: Exception, kind: str) -> None:
    with pytest.raises(type(error) if kind == "out_of_memory" else EntrypointError) as raised, calling_user("a loss"):
        raise error
    assert kind_of(raised.value) == kind
    assert kind_of(error) == ("internal" if isinstance(error, ValueError) else kind)
