"""Rows that dispatchers send, and the work that a rank reads in those it receives."""

import torch
from torch import Tensor

from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.model.moe.expert_parallel import ExpertParallelContext
from orchestrator.model.moe.layer import MoELayer
from orchestrator.model.moe.per_choice_dispatcher import PerChoiceDispatcher
from orchestrator.model.moe.per_rank_dispatcher import PerRankDispatcher
from orchestrator.spec.model import ModelSpec

PLACEMENT = ExpertPlacement(4, 3, ((0,), (0,), (1,), (2,)))
IDS_NK, GATES_NK = torch.tensor([[1, 0], [2, 0], [3, 1]]), torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
TOKENS_ND = torch.tensor([[1.0], [2.0], [3.0]])


def _home(rank: int) -> ExpertParallelContext:
    return ExpertParallelContext(PLACEMENT, rank, None)


def _received(gates_ML: Tensor) -> Tensor:
    return torch.cat([torch.zeros(len(gates_ML), 5), gates_ML], dim=1)


def test_a_token_goes_once_to_a_rank_with_its_gates_for_that_ranks_experts() -> None:
    rows = PerRankDispatcher(_home(2)).rows(IDS_NK, GATES_NK)
    assert rows.sent_W.tolist() == [3, 1, 1]
    assert rows.token_S.tolist() == [0, 1, 2, 1, 2]
    wanted_SL = [[0.2, 0.1], [0.4, 0.0], [0.0, 0.6], [0.3, 0.0], [0.5, 0.0]]
    torch.testing.assert_close(rows.gates_SL, torch.tensor(wanted_SL))
    there = PerRankDispatcher(_home(0))
    work = there.expert_input(_received(rows.gates_SL[:3]), there.batches([0, 0, 3]))
    assert (work.row_R.tolist(), work.counts, work.num_batches) == ([0, 1, 0, 2], [2, 2], 1)
    torch.testing.assert_close(work.gates_R, torch.tensor([0.2, 0.4, 0.1, 0.6]))


def test_a_choice_goes_alone_and_ranks_are_computed_apart() -> None:
    rows = PerChoiceDispatcher(_home(2)).rows(IDS_NK, GATES_NK)
    assert rows.sent_W.tolist() == [4, 1, 1]
    assert rows.token_S.tolist() == [0, 1, 0, 2, 1, 2]
    wanted_SL = [[0.2, 0.0], [0.4, 0.0], [0.0, 0.1], [0.0, 0.6], [0.3, 0.0], [0.5, 0.0]]
    torch.testing.assert_close(rows.gates_SL, torch.tensor(wanted_SL))
    there = PerChoiceDispatcher(_home(0))
    work = there.expert_input(_received(rows.gates_SL[:4]), there.batches([1, 0, 3]))
    assert (work.row_R.tolist(), work.counts, work.num_batches) == ([0, 1, 2, 3], [1, 0, 1, 0, 0, 2], 3)


def test_results_are_added_up_per_token() -> None:
    for dispatcher, copies_N in ((PerRankDispatcher(_home(2)), [1, 2, 2]), (PerChoiceDispatcher(_home(2)), [2, 2, 2])):
        rows = dispatcher.rows(IDS_NK, GATES_NK)
        wanted_ND = TOKENS_ND * torch.tensor(copies_N)[:, None]
        assert torch.equal(rows.add_up(rows.spread(TOKENS_ND), None), wanted_ND)
        assert torch.equal(rows.add_up(rows.spread(TOKENS_ND), TOKENS_ND), wanted_ND + TOKENS_ND)


def test_a_gate_that_is_not_a_number_is_computed() -> None:
    dispatcher = PerRankDispatcher(ExpertParallelContext(ExpertPlacement.balanced(2, 2), 0, None))
    work = dispatcher.expert_input(_received(torch.tensor([[float("nan")], [0.0]])), [2])
    assert work.counts == [1] and work.gates_R.isnan().all()


def test_routes_follow_the_layer_and_are_no_state() -> None:
    layer = MoELayer(ModelSpec(), ExpertParallelContext(ExpertPlacement.balanced(8, 1), 0, None, is_exact=True))
    assert not [name for name in layer.state_dict() if name.startswith("dispatcher.")]
    assert dict(layer.to("meta").named_buffers())["dispatcher.column_E"].is_meta
