"""The mixture-of-experts layer: experts spread unevenly over ranks, tokens sent to them and back, none dropped.

A token is sent once to each rank that holds experts of its choice, by an uneven all-to-all, is processed there, and
returns as the sum of these experts' outputs. Experts are keyed by their global id, so a parameter's name identifies its
expert on whichever rank it is.

Shape legend: N = local tokens, K = experts per token, R = N * K copies, S = rows sent, M = rows received, D = hidden
size, H = expert intermediate size, E = experts, W = world size.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from orchestrator.comm.tokens.all_to_all import AsyncAllToAll, gather_counts
from orchestrator.model.moe.dispatch import Dispatch, PerChoiceRows
from orchestrator.model.moe.expert_parallel import ExpertParallelContext
from orchestrator.model.moe.experts import GatedMLP, run_experts
from orchestrator.model.moe.router import Router
from orchestrator.protocol.usage import TrafficKind
from orchestrator.spec.model import ModelSpec


class MoELayer(nn.Module):
    """Routed experts plus shared ones.

    Args:
        spec: sizes and routing. The shared experts, which process every token, are fused into one MLP.
        home: placement of the experts, seen from this rank.
    """

    def __init__(self, spec: ModelSpec, home: ExpertParallelContext) -> None:
        super().__init__()
        num_experts, size, inner = spec.n_routed_experts, spec.hidden_size, spec.moe_intermediate_size
        self.num_experts = num_experts
        self.top_k = spec.num_experts_per_tok
        self.router = Router(spec, home.limits(spec.num_experts_per_tok))
        self.experts = nn.ModuleDict({str(expert): GatedMLP(size, inner) for expert in home.local_experts})
        self.shared = GatedMLP(size, spec.n_shared_experts * inner) if spec.n_shared_experts else None
        self.home = home
        self._dispatch = Dispatch(home.placement, home.rank, home.destinations)
        self.real_N: Tensor | None = None  # if given, indices of the tokens that aren't padding; only these are routed
        self.last_counts_E: Tensor = torch.zeros(num_experts, dtype=torch.int64)
        self.last_margins_EM: Tensor | None = None
        self.last_balance_loss: Tensor | None = None

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        if self.real_N is None:
            return self._mix(x_ND).view_as(x_BTD)
        return torch.zeros_like(x_ND).index_copy(0, self.real_N, self._mix(x_ND[self.real_N])).view_as(x_BTD)

    def _mix(self, x_ND: Tensor) -> Tensor:
        routing = self.router(x_ND)
        flat_ids_R = routing.expert_ids_NK.reshape(-1)
        counts_E = torch.bincount(flat_ids_R, minlength=self.num_experts)
        self.last_counts_E, self.last_margins_EM = counts_E, routing.margins_EM
        self.last_balance_loss = routing.balance_loss

        gates_NK = routing.gates_NK.to(x_ND.dtype)
        if self.home.is_exact:
            return self._run_exactly(x_ND, routing.expert_ids_NK, gates_NK)
        if self.home.group is None:
            return self._run_here(x_ND, routing.expert_ids_NK, gates_NK, counts_E)
        return self._run_everywhere(x_ND, routing.expert_ids_NK, gates_NK, self.home.group)

    def _run_here(self, x_ND: Tensor, expert_ids_NK: Tensor, gates_NK: Tensor, counts_E: Tensor) -> Tensor:
        """A world of one: nothing is sent, and experts read the tokens in place."""
        order_R = expert_ids_NK.reshape(-1).argsort(stable=True)
        token_R = order_R.div(self.top_k, rounding_mode="floor")
        y_ND = run_experts(x_ND, token_R, counts_E.tolist(), self._local_experts, gates_NK.reshape(-1)[order_R])
        return y_ND if self.shared is None else y_ND + self.shared(x_ND)

    def _run_everywhere(
        self, x_ND: Tensor, expert_ids_NK: Tensor, gates_NK: Tensor, group: dist.ProcessGroup
    ) -> Tensor:
        """Send tokens to their experts and return the results. The shared experts are computed during the transfers,
        half during each, in the backward pass too."""
        rows, columns = self._dispatch.rows(expert_ids_NK, gates_NK), self._dispatch.num_columns
        counts_WW = gather_counts(rows.sent_W, group).cpu()
        sent_W, received_W = counts_WW[self.home.rank].tolist(), counts_WW[:, self.home.rank].tolist()

        wire, is_far_W = self.home.wire, self.home.is_far_W
        there = AsyncAllToAll(sent_W, received_W, group, TrafficKind.DISPATCH, wire, columns, is_far_W)
        on_the_way = there.begin(torch.cat([x_ND.index_select(0, rows.token_S), rows.gates_SL], dim=1))
        inner_NH = None if self.shared is None else self.shared.inner(x_ND)
        received_MD, gates_ML = torch.split(there.end(on_the_way), [x_ND.shape[1], columns], dim=1)

        row_R, counts, gates_R = self._dispatch.copies(gates_ML)
        results_MD = run_experts(received_MD, row_R, counts, self._local_experts, gates_R)

        back = AsyncAllToAll(received_W, sent_W, group, TrafficKind.COMBINE, wire, is_far_W=is_far_W)
        on_the_way_SD = back.begin(results_MD)
        y_ND = torch.zeros_like(x_ND) if self.shared is None or inner_NH is None else self.shared.outer(inner_NH)
        return y_ND.index_add(0, rows.token_S, back.end(on_the_way_SD))

    def _run_exactly(self, x_ND: Tensor, expert_ids_NK: Tensor, gates_NK: Tensor) -> Tensor:
        """Like `_run_everywhere` with each copy sent separately, and no product that mixes the tokens of two ranks: the
        operations are those of a world of one, at any world size."""
        rows, order_S = self._dispatch.rows_apart(expert_ids_NK, gates_NK)
        apart, columns, group = PerChoiceRows(order_S, self.top_k), self._dispatch.num_columns, self.home.group
        counts_WW = rows.sent_W[None] if group is None else gather_counts(rows.sent_W, group).cpu()
        sent_W, received_W = counts_WW[self.home.rank].tolist(), counts_WW[:, self.home.rank].tolist()

        is_far_W = self.home.is_far_W
        there = AsyncAllToAll(sent_W, received_W, group, TrafficKind.DISPATCH, is_far_W=is_far_W)
        on_the_way = there.begin(torch.cat([apart.spread(x_ND), rows.gates_SL], dim=1))
        inner_NH = None if self.shared is None else self.shared.inner(x_ND)
        received_MD, gates_ML = torch.split(there.end(on_the_way), [x_ND.shape[1], columns], dim=1)

        row_R, counts, gates_R = self._dispatch.copies(gates_ML, received_W)
        by_rank = [expert for expert in self._local_experts for _ in received_W]
        results_MD = run_experts(received_MD, row_R, counts, by_rank, gates_R)

        back = AsyncAllToAll(received_W, sent_W, group, TrafficKind.COMBINE, is_far_W=is_far_W)
        on_the_way_SD = back.begin(results_MD)
        shared_ND = None if self.shared is None or inner_NH is None else self.shared.outer(inner_NH)
        y_ND = apart.add_up(back.end(on_the_way_SD))
        return y_ND if shared_ND is None else y_ND + shared_ND

    @property
    def _local_experts(self) -> list[GatedMLP]:
        return list(self.experts.values())  # type: ignore[arg-type]
