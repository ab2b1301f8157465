"""The mixture-of-experts layer: experts spread over ranks unevenly, tokens sent to them and back, none dropped.

A token's k copies are sorted by the rank and expert they go to, exchanged by an uneven all-to-all, run through the
experts in contiguous runs, and sent back. Experts are keyed by their global id, so a parameter's name says which
expert it is whatever rank holds it.

Shape legend: N = local tokens, K = experts per token, R = N * K copies sent, M = copies received, D = hidden size,
H = expert intermediate size, E = experts, W = world size.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.comm.exchange import exchange_rows, gather_counts
from orchestrator.elastic.placement import Placement
from orchestrator.model.router import Router
from orchestrator.spec.model import ModelSpec


class GatedMLP(nn.Module):
    """SwiGLU (arXiv:2002.05202): down(silu(gate(x)) * up(x)), gate and up in one matrix."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(2 * intermediate_size, hidden_size))
        self.down = nn.Parameter(torch.empty(hidden_size, intermediate_size))

    def forward(self, x_ND: Tensor) -> Tensor:
        gate_NH, up_NH = F.linear(x_ND, self.gate_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate_NH) * up_NH, self.down)


@dataclass(frozen=True)
class ExpertHome:
    """Where the experts live, seen from one rank.

    Args:
        placement: which ranks hold which expert.
        rank: this rank.
        group: the world; None for a world of one.
    """

    placement: Placement
    rank: int
    group: dist.ProcessGroup | None

    @property
    def local_experts(self) -> tuple[int, ...]:
        return self.placement.experts_of(self.rank)

    def destinations(self) -> Tensor:
        """The rank to which this rank sends tokens for each expert (E): itself if it holds the expert, else one of
        its holders, chosen so that the senders spread over the replicas."""
        ranks = []
        for holders in self.placement.holders:
            ranks.append(self.rank if self.rank in holders else holders[self.rank % len(holders)])
        return torch.tensor(ranks, dtype=torch.int64, device="cpu")


class MoELayer(nn.Module):
    """Routed experts plus shared ones.

    Args:
        spec: sizes and routing. The shared experts, which every token visits, are fused into one MLP.
        home: which experts this rank holds.
    """

    def __init__(self, spec: ModelSpec, home: ExpertHome) -> None:
        super().__init__()
        num_experts, size, inner = spec.num_experts, spec.hidden_size, spec.expert_intermediate_size
        self.num_experts = num_experts
        self.top_k = spec.top_k
        self.router = Router(spec)
        self.experts = nn.ModuleDict({str(expert): GatedMLP(size, inner) for expert in home.local_experts})
        self.shared = GatedMLP(size, spec.num_shared_experts * inner) if spec.num_shared_experts else None
        self.home = home
        # Order in which copies leave: by destination rank, then by expert. Fixed for the life of a generation.
        destination_E = home.destinations()
        expert_order = sorted(range(num_experts), key=lambda e: (int(destination_E[e]), e))
        place_E = [0] * num_experts
        for place, expert in enumerate(expert_order):
            place_E[expert] = place
        self._send_order_E = torch.tensor(place_E)
        self._destination_E = destination_E
        self._expects_WE = _expected(home, num_experts)
        self.last_counts_E: Tensor = torch.zeros(num_experts, dtype=torch.int64)
        self.last_balance_loss: Tensor | None = None

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        routing = self.router(x_ND)
        flat_ids_R = routing.expert_ids_NK.reshape(-1)
        counts_E = torch.bincount(flat_ids_R, minlength=self.num_experts)
        self.last_counts_E, self.last_balance_loss = counts_E, routing.balance_loss

        order_R = self._send_order_E[flat_ids_R].argsort(stable=True)
        token_R = order_R.div(self.top_k, rounding_mode="floor")
        returned_RD = self._visit_experts(x_ND[token_R], counts_E)
        gates_R1 = routing.gates_NK.reshape(-1)[order_R, None].to(x_ND.dtype)
        y_ND = torch.zeros_like(x_ND).index_add(0, token_R, returned_RD * gates_R1)
        if self.shared is not None:
            y_ND = y_ND + self.shared(x_ND)
        return y_ND.view_as(x_BTD)

    def _visit_experts(self, sent_RD: Tensor, counts_E: Tensor) -> Tensor:
        """Send the copies to their experts and bring the results back in the same order."""
        counts_WE = gather_counts(counts_E, self.home.group).cpu()
        world_size = counts_WE.shape[0]
        sent_W = torch.zeros(world_size, dtype=torch.int64).index_add_(
            0, self._destination_E, counts_WE[self.home.rank]
        )
        arriving_WE = counts_WE * self._expects_WE
        local = list(self.home.local_experts)
        arriving_WL = arriving_WE[:, local] if local else arriving_WE[:, :0]
        received_W = arriving_WL.sum(-1)

        received_MD = exchange_rows(sent_RD, sent_W.tolist(), received_W.tolist(), self.home.group)
        results_MD = self._run_experts(received_MD, arriving_WL)
        return exchange_rows(results_MD, received_W.tolist(), sent_W.tolist(), self.home.group)

    def _run_experts(self, received_MD: Tensor, arriving_WL: Tensor) -> Tensor:
        """Copies arrive by source rank, then expert; each expert wants its own from all ranks side by side."""
        num_sources, num_local = arriving_WL.shape
        if num_local == 0:
            return received_MD
        runs = torch.split(received_MD, arriving_WL.reshape(-1).tolist())
        results: list[list[Tensor]] = []
        for column, expert in enumerate(self.experts.values()):
            mine = [runs[source * num_local + column] for source in range(num_sources)]
            # An expert that no token chose still runs, on no rows: its gradients must exist on every rank.
            y_ND = expert(torch.cat(mine) if num_sources > 1 else mine[0])
            results.append(list(y_ND.split([len(run) for run in mine])))
        return torch.cat([results[column][source] for source in range(num_sources) for column in range(num_local)])


def _expected(home: ExpertHome, num_experts: int) -> Tensor:
    """1 where rank w's tokens for expert e come to this rank (W, E)."""
    placement = home.placement
    expects_WE = torch.zeros(placement.world_size, num_experts, dtype=torch.int64, device="cpu")
    for source in range(placement.world_size):
        destination_E = ExpertHome(placement, source, None).destinations()
        expects_WE[source] = (destination_E == home.rank).to(torch.int64)
    return expects_WE
