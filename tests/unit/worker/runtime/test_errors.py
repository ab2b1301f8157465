"""Kinds of errors, also of those that pass through the user's code."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from orchestrator.comm.transport.peer_group import PeerGroup
from orchestrator.errors import EntrypointError
from orchestrator.model.factory import build_model, single_rank
from orchestrator.user_code import calling_user
from orchestrator.worker.runtime.errors import AbortedGeneration, SumNotProven, kind_of
from tests.support.own_models import linear, own_spec

LOST = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Connection reset by peer")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
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
    assert kind_of(LOST) == "peer_lost"


@pytest.mark.parametrize("message", [str(LOST), "the request timed out", "nccl is not for me"])
def test_words_of_collectives_in_an_error_of_the_users_own_are_no_lost_peer(message: str) -> None:
    with pytest.raises(EntrypointError) as raised, calling_user("a loss"):
        raise RuntimeError(message)
    assert kind_of(raised.value) == "user_error"


def test_words_of_collectives_in_an_error_of_a_users_forward_are_no_lost_peer(tmp_path: Path) -> None:
    spec = own_spec(tmp_path, linear(forward="raise RuntimeError('the request timed out')"))
    model = build_model(spec, 50, single_rank(spec))
    with pytest.raises(RuntimeError) as raised:
        model(torch.zeros((1, 4), dtype=torch.int64))
    assert kind_of(raised.value) == "user_error"


def test_a_peer_that_is_lost_in_a_collective_is_one_also_within_users_code() -> None:
    store = dist.HashStore()
    with ThreadPoolExecutor(2) as pool:
        mine, other = pool.map(lambda me: PeerGroup(store, "peers", ("a", "b"), me), "ab")
    other.close()
    with pytest.raises(EntrypointError, match="gloo") as raised, calling_user("a loss"):
        mine.barrier()
    assert kind_of(raised.value) == "peer_lost"
    mine.close()
