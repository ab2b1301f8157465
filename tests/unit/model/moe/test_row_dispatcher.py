"""Rows that dispatchers send, and the work that a rank reads in those it receives."""

import pytest
import torch
from torch import Tensor

from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.model.moe.expert_parallel import ExpertParallelContext
from orchestrator.model.moe.layer import MoELayer
from orchestrator.model.moe.per_choice_dispatcher import PerChoiceDispatcher
from orchestrator.model.moe.per_rank_dispatcher import PerRankDispatcher
from orchestrator.model.moe.row_dispatcher import RowDispatcher, TokenChoice
from orchestrator.spec.model import ModelSpec
from tests.support import devices

pytestmark = pytest.mark.usefixtures("device")

PLACEMENT = ExpertPlacement(4, 3, ((0,), (0,), (1,), (2,)))
IDS, GATES = [[1, 0], [2, 0], [3, 1]], [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]


def _choice(kind: type[RowDispatcher], rank: int, gates: list[list[float]] = GATES) -> TokenChoice:
    return _dispatcher(kind, rank).choice(_tensor(IDS), _tensor(gates))


def _dispatcher(kind: type[RowDispatcher], rank: int) -> RowDispatcher:
    return kind(ExpertParallelContext(PLACEMENT, rank, None)).to(devices.device())


def _tensor(values: list[list[float]] | list[list[int]]) -> Tensor:
    return torch.tensor(values, device=devices.device())


def _received(gates_ML: Tensor) -> Tensor:
    return torch.cat([gates_ML.new_zeros(len(gates_ML), 5), gates_ML], dim=1)


def test_a_token_goes_once_to_a_rank_with_its_gates_for_that_ranks_experts() -> None:
    choice = _choice(PerRankDispatcher, 2)
    assert choice.counts_W2.tolist() == [[3, 4], [1, 1], [1, 1]]
    rows = choice.rows(5)
    assert rows.token_S.tolist() == [0, 1, 2, 1, 2]
    wanted_SL = [[0.2, 0.1], [0.4, 0.0], [0.0, 0.6], [0.3, 0.0], [0.5, 0.0]]
    torch.testing.assert_close(rows.gates_SL, _tensor(wanted_SL))
    there = _dispatcher(PerRankDispatcher, 0)
    work = there.expert_input(_received(rows.gates_SL[:3]), there.batches([0, 0, 3]), 4)
    assert (work.row_R.tolist(), work.counts.tolist(), work.num_batches) == ([0, 1, 0, 2], [2, 2], 1)
    assert work.gates_R.tolist() == pytest.approx([0.2, 0.4, 0.1, 0.6])


def test_a_choice_goes_alone_and_ranks_are_computed_apart() -> None:
    choice = _choice(PerChoiceDispatcher, 2)
    assert choice.counts_W2.tolist() == [[4, 4], [1, 1], [1, 1]]
    rows = choice.rows(6)
    assert rows.token_S.tolist() == [0, 1, 0, 2, 1, 2]
    wanted_SL = [[0.2, 0.0], [0.4, 0.0], [0.0, 0.1], [0.0, 0.6], [0.3, 0.0], [0.5, 0.0]]
    torch.testing.assert_close(rows.gates_SL, _tensor(wanted_SL))
    there = _dispatcher(PerChoiceDispatcher, 0)
    work = there.expert_input(_received(rows.gates_SL[:4]), there.batches([1, 0, 3]), 4)
    assert (work.row_R.tolist(), work.counts.tolist(), work.num_batches) == ([0, 1, 2, 3], [1, 0, 1, 0, 0, 2], 3)


def test_results_are_added_up_per_token() -> None:
    tokens_ND = _tensor([[1.0], [2.0], [3.0]])
    for kind, copies in ((PerRankDispatcher, [[1], [2], [2]]), (PerChoiceDispatcher, [[2], [2], [2]])):
        choice = _choice(kind, 2)
        rows = choice.rows(int(choice.counts_W2[:, 0].sum()))
        wanted_ND = tokens_ND * _tensor(copies)
        assert torch.equal(rows.add_up(rows.spread(tokens_ND), None), wanted_ND)
        assert torch.equal(rows.add_up(rows.spread(tokens_ND), tokens_ND), wanted_ND + tokens_ND)


def test_a_chosen_expert_with_a_gate_of_zero_computes_nothing() -> None:
    for kind in (PerRankDispatcher, PerChoiceDispatcher):
        choice = _choice(kind, 2, [[0.1, 0.0], [0.3, 0.4], [0.5, 0.0]])
        assert choice.counts_W2[:, 1].tolist() == [2, 1, 1]


def test_a_gate_that_is_not_a_number_is_computed() -> None:
    dispatcher = PerRankDispatcher(ExpertParallelContext(ExpertPlacement.balanced(2, 2), 0, None))
    work = dispatcher.expert_input(_received(_tensor([[float("nan")], [0.0]])), [2], 1)
    assert work.counts.tolist() == [1] and work.gates_R.isnan().all()


def test_routes_follow_the_layer_and_are_no_state() -> None:
    layer = MoELayer(ModelSpec(), ExpertParallelContext(ExpertPlacement.balanced(8, 1), 0, None, is_exact=True))
    assert not [name for name in layer.state_dict() if name.startswith("dispatcher.")]
    assert dict(layer.to("meta").named_buffers())["dispatcher.column_E"].is_meta
