"""What members conclude from their ballots."""

from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.model.moe.routing.balance import RoutingCounts
from orchestrator.worker.step.proven_sum import nonce_of
from orchestrator.worker.step.vote import NO_FENCE, Ballot, VoteResult, vote
from tests.unit.comm.threads import on_ranks

NONCE = nonce_of(3, 17)


def _sums(*losses: float) -> torch.Tensor:
    return torch.tensor(losses, dtype=torch.float64)[:, None]


def _routed(counts: list[list[int]], margins: list[list[list[int]]] | None = None) -> RoutingCounts:
    return RoutingCounts.of(torch.tensor(counts), None if margins is None else torch.tensor(margins))


def _ballot(losses: list[float], **changes: Any) -> Ballot:
    fields: dict[str, Any] = {
        "sums_SM": _sums(*losses),
        "validation_SM": _sums(),
        "routed": _routed([[1, 2], [3, 4]]),
        "applied": True,
    }
    return Ballot(**{**fields, **changes})


def _together(ballots: list[Ballot]) -> list[VoteResult]:
    """What each rank concludes."""
    return on_ranks(len(ballots), lambda rank, group: vote(ballots[rank], rank, len(ballots), group, NONCE))


def test_a_world_of_one_gets_its_own_vote() -> None:
    outcome = vote(_ballot([1.5, 2.5], validation_SM=_sums(0.25, 0.5), fence=7, finish=True), 0, 1, None, NONCE)
    assert (outcome.sums, outcome.validation_sums) == ((4.0,), (0.75,))
    assert outcome.routed.counts_LE.tolist() == [[1, 2], [3, 4]]
    assert (outcome.applied, outcome.fence, outcome.finish) == (True, 7, True)
    assert vote(_ballot([1.0]), 0, 1, None, NONCE).validation_sums == ()


def test_all_ranks_conclude_the_same() -> None:
    ballots = [_ballot([1.0, 0.0, 0.0]), _ballot([0.0, 2.0, 4.0])]
    one, other = _together(ballots)
    assert one.sums == other.sums == (7.0,)
    assert one.routed.counts_LE.tolist() == other.routed.counts_LE.tolist() == [[2, 4], [6, 8]]


def test_the_sum_is_in_micro_batch_order_for_any_distribution_over_ranks() -> None:
    losses = [1e16, 1.0, -1e16, 1.0]
    alone = vote(_ballot(losses), 0, 1, None, NONCE).sums
    split = _together([_ballot([losses[0], 0, 0, losses[3]]), _ballot([0, losses[1], losses[2], 0])])
    assert split[0].sums == split[1].sums == alone


@pytest.mark.parametrize(
    ("fences", "agreed"),
    [((3, 3), 3), ((3, NO_FENCE), NO_FENCE), ((3, 4), NO_FENCE), ((NO_FENCE, NO_FENCE), NO_FENCE)],
)
def test_a_fence_needs_everyone(fences: tuple[int, int], agreed: int) -> None:
    outcomes = _together([_ballot([0.0], fence=fence) for fence in fences])
    assert [o.fence for o in outcomes] == [agreed, agreed]


@pytest.mark.parametrize("due", [(False, False), (True, False), (False, True), (True, True)])
def test_a_checkpoint_is_written_by_all_if_it_is_due_for_one(due: tuple[bool, bool]) -> None:
    outcomes = _together([_ballot([0.0], checkpoint=is_due) for is_due in due])
    assert [o.checkpoint for o in outcomes] == [any(due)] * 2


def test_an_end_needs_everyone_and_one_skipped_update_counts_for_all() -> None:
    outcomes = _together([_ballot([0.0], finish=True, applied=False), _ballot([0.0])])
    assert [(o.finish, o.applied) for o in outcomes] == [(False, False)] * 2


def test_metrics_are_summed_each_for_itself() -> None:
    def sums(*rows: tuple[float, ...]) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.float64)

    first, second, nothing = (1.0, 10.0, 100.0), (2.0, 20.0, 200.0), (0.0, 0.0, 0.0)
    ballots = [
        _ballot([], sums_SM=sums(first, nothing), validation_SM=sums(first, nothing)),
        _ballot([], sums_SM=sums(nothing, second), validation_SM=sums(nothing, second)),
    ]
    for outcome in _together(ballots):
        assert outcome.sums == outcome.validation_sums == (3.0, 30.0, 300.0)


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_parts_of_the_vector_do_not_run_into_each_other(world_size: int) -> None:
    ballots = [
        _ballot(
            [10.0 + rank if micro_batch == rank else 0.0 for micro_batch in range(4)],
            validation_SM=_sums(*(100.0 if micro_batch == rank else 0.0 for micro_batch in range(2))),
            routed=_routed([[2**40 + rank, 0, 5]], [[[7, rank], [0, 2**41], [1, 1]]]),
            fence=6,
            finish=True,
        )
        for rank in range(world_size)
    ]
    for outcome in _together(ballots):
        assert outcome.sums == (sum(10.0 + rank for rank in range(world_size)),)
        assert outcome.validation_sums == (100.0 * min(world_size, 2),)
        assert outcome.routed.counts_LE.tolist() == [[2**40 * world_size + sum(range(world_size)), 0, 5 * world_size]]
        assert outcome.routed.counts_LE.dtype == outcome.routed.margins_LEM.dtype == torch.int64
        ranks = sum(range(world_size))
        margins = [[[7 * world_size, ranks], [0, 2**41 * world_size], [world_size, world_size]]]
        assert outcome.routed.margins_LEM.tolist() == margins
        assert (outcome.applied, outcome.fence, outcome.finish) == (True, 6, True)


def test_a_loss_that_is_not_finite_is_not_hidden() -> None:
    assert all(np.isnan(outcome.sums[0]) for outcome in _together([_ballot([np.nan, 0.0]), _ballot([0.0, 1.0])]))


def test_a_model_without_experts_votes_too() -> None:
    nothing = RoutingCounts.of(torch.zeros(0, 8, dtype=torch.int64))
    outcomes = _together([_ballot([1.0], routed=nothing)] * 2)
    assert [tuple(outcome.routed.counts_LE.shape) for outcome in outcomes] == [(0, 8), (0, 8)]


def test_the_longest_interval_wins() -> None:
    assert [o.interval for o in _together([_ballot([0.0], interval=1), _ballot([0.0], interval=7)])] == [7, 7]
