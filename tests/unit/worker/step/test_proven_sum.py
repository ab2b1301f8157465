"""Sums that prove themselves, and results of all-reduces that were aborted."""

import pytest
import torch
from torch import Tensor

from orchestrator.worker.runtime.errors import SumNotProven, kind_of
from orchestrator.worker.step.proven_sum import checked, nonce_of, proven_sum
from tests.support import devices
from tests.unit.comm.threads import on_ranks

pytestmark = pytest.mark.usefixtures("device")

NONCE = nonce_of(3, 17)
LARGE = [2**62, -(2**63), 0, -1, 5]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_sums_wrap_and_are_proven(world_size: int) -> None:
    def run(rank: int, group: object) -> list[int]:
        values = torch.tensor(LARGE, device=devices.device()) + rank
        sums: list[int] = proven_sum(values, group, NONCE).tolist()  # type: ignore[arg-type]
        return sums

    wanted = [(world_size * value + sum(range(world_size)) + 2**63) % 2**64 - 2**63 for value in LARGE]
    assert on_ranks(world_size, run) == [wanted] * world_size


def _both(values: Tensor, nonce: int = NONCE) -> Tensor:
    return torch.stack([values, nonce - values])


def test_an_aborted_all_reduce_is_found_out() -> None:
    mine, peers = torch.tensor(LARGE), torch.tensor([7, 0, 0, 1, 2])
    whole = _both(mine) + _both(peers)
    assert torch.equal(checked(whole, 2, NONCE), mine + peers)
    half_filled = whole.clone()
    half_filled[:, 3:] = _both(mine)[:, 3:]
    stale = _both(mine, nonce_of(3, 16)) + _both(peers, nonce_of(3, 16))
    for result in (_both(mine), half_filled, stale, torch.zeros_like(whole), whole + _both(peers)):
        with pytest.raises(SumNotProven, match="isn't the sum over all ranks") as raised:
            checked(result, 2, NONCE)
    assert kind_of(raised.value) == "peer_lost"


def test_each_step_of_each_generation_has_a_distinct_nonce() -> None:
    nonces = {nonce_of(generation, step) for generation in range(20) for step in range(500)}
    assert len(nonces) == 20 * 500 and all(nonce % 2 and -(2**63) <= nonce < 2**63 for nonce in nonces)
