import threading
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from orchestrator.worker import vote as module
from orchestrator.worker.vote import NO_FENCE, Ballot, Outcome, vote

CPU = torch.device("cpu")


def _ballot(losses: list[float], **changes: Any) -> Ballot:
    fields: dict[str, Any] = {
        "slot_losses": np.array(losses),
        "validation_losses": np.zeros(0),
        "counts_LE": torch.tensor([[1, 2], [3, 4]]),
        "applied": True,
    }
    return Ballot(**{**fields, **changes})


def _together(ballots: list[Ballot], monkeypatch: pytest.MonkeyPatch) -> list[Outcome]:
    """What each rank concludes; ranks are threads, the all-reduce is the sum of their vectors."""
    barrier = threading.Barrier(len(ballots))
    vectors: list[torch.Tensor] = []
    lock = threading.Lock()

    def all_reduce(vector: torch.Tensor, group: object) -> None:
        with lock:
            vectors.append(vector.clone())
        barrier.wait()
        vector.copy_(torch.stack(vectors).sum(0))

    monkeypatch.setattr(module.dist, "all_reduce", all_reduce)
    outcomes: dict[int, Outcome] = {}

    def run(rank: int) -> None:
        group: Any = dist  # not None: a world of more than one
        outcomes[rank] = vote(ballots[rank], rank, len(ballots), group, CPU)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(ballots))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [outcomes[rank] for rank in range(len(ballots))]


def test_a_world_of_one_hears_itself() -> None:
    outcome = vote(_ballot([1.5, 2.5], validation_losses=np.array([0.25, 0.5]), fence=7, finish=True), 0, 1, None, CPU)
    assert (outcome.loss_sum, outcome.validation_loss_sum) == (4.0, 0.75)
    assert outcome.counts_LE.tolist() == [[1, 2], [3, 4]]
    assert (outcome.applied, outcome.fence, outcome.finish) == (True, 7, True)
    assert vote(_ballot([1.0]), 0, 1, None, CPU).validation_loss_sum is None


def test_all_ranks_conclude_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    ballots = [_ballot([1.0, 0.0, 0.0]), _ballot([0.0, 2.0, 4.0])]
    one, other = _together(ballots, monkeypatch)
    assert one.loss_sum == other.loss_sum == 7.0
    assert one.counts_LE.tolist() == other.counts_LE.tolist() == [[2, 4], [6, 8]]


def test_the_sum_is_in_slot_order_whoever_had_the_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = [1e16, 1.0, -1e16, 1.0]
    alone = vote(_ballot(losses), 0, 1, None, CPU).loss_sum
    split = _together([_ballot([losses[0], 0, 0, losses[3]]), _ballot([0, losses[1], losses[2], 0])], monkeypatch)
    assert split[0].loss_sum == split[1].loss_sum == alone


@pytest.mark.parametrize(
    ("fences", "agreed"),
    [((3, 3), 3), ((3, NO_FENCE), NO_FENCE), ((3, 4), NO_FENCE), ((NO_FENCE, NO_FENCE), NO_FENCE)],
)
def test_a_fence_needs_everyone(fences: tuple[int, int], agreed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = _together([_ballot([0.0], fence=fence) for fence in fences], monkeypatch)
    assert [o.fence for o in outcomes] == [agreed, agreed]


def test_an_end_needs_everyone_and_one_skipped_update_counts_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = _together([_ballot([0.0], finish=True, applied=False), _ballot([0.0])], monkeypatch)
    assert [(o.finish, o.applied) for o in outcomes] == [(False, False)] * 2
