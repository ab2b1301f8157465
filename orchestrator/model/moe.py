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
from torch import Tensor, nn

from orchestrator.comm.exchange import Journey, gather_counts
from orchestrator.comm.wire import Wire
from orchestrator.elastic.placement import Placement
from orchestrator.model.experts import GatedMLP, run_experts
from orchestrator.model.router import Router
from orchestrator.protocol.traffic import TrafficKind
from orchestrator.spec.model import ModelSpec


@dataclass(frozen=True)
class ExpertHome:
    """Where the experts live, seen from one rank.

    Args:
        placement: which ranks hold which expert.
        rank: this rank.
        group: the world; None for a world of one.
        wire: how tokens and results travel.
    """

    placement: Placement
    rank: int
    group: dist.ProcessGroup | None
    wire: Wire = "exact"

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
        self.real_N: Tensor | None = None  # given, the numbers of the tokens that aren't padding, which isn't routed
        self.last_counts_E: Tensor = torch.zeros(num_experts, dtype=torch.int64)
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
        self.last_counts_E, self.last_balance_loss = counts_E, routing.balance_loss

        order_R = self._send_order_E[flat_ids_R].argsort(stable=True)
        token_R = order_R.div(self.top_k, rounding_mode="floor")
        gates_R = routing.gates_NK.reshape(-1)[order_R].to(x_ND.dtype)
        run = self._run_here if self.home.group is None else self._run_everywhere
        return run(x_ND, token_R, gates_R, counts_E)

    def _run_here(self, x_ND: Tensor, token_R: Tensor, gates_R: Tensor, counts_E: Tensor) -> Tensor:
        """A world of one: nothing travels, and experts read the tokens where they are."""
        y_ND = run_experts(x_ND, token_R, counts_E.tolist(), self._local_experts, gates_R)
        return y_ND if self.shared is None else y_ND + self.shared(x_ND)

    def _run_everywhere(self, x_ND: Tensor, token_R: Tensor, gates_R: Tensor, counts_E: Tensor) -> Tensor:
        """Send the copies to their experts and bring the results back in the same order. While they travel, either
        way and in the backward pass too, the shared experts are computed, half each."""
        counts_WE = gather_counts(counts_E, self.home.group).cpu()
        sent_W = torch.zeros(len(counts_WE), dtype=torch.int64).index_add_(
            0, self._destination_E, counts_WE[self.home.rank]
        )
        arriving_WL = (counts_WE * self._expects_WE)[:, list(self.home.local_experts)]
        received_W = arriving_WL.sum(-1)

        there = Journey(sent_W.tolist(), received_W.tolist(), self.home.group, TrafficKind.DISPATCH, self.home.wire)
        on_the_way_MD = there.begin(x_ND[token_R])
        inner_NH = None if self.shared is None else self.shared.inner(x_ND)
        received_MD = there.end(on_the_way_MD)

        by_expert_M = expert_major(arriving_WL).to(x_ND.device)
        results_MD = run_experts(received_MD, by_expert_M, arriving_WL.sum(0).tolist(), self._local_experts)

        back = Journey(received_W.tolist(), sent_W.tolist(), self.home.group, TrafficKind.COMBINE, self.home.wire)
        on_the_way_RD = back.begin(results_MD)
        y_ND = torch.zeros_like(x_ND) if self.shared is None or inner_NH is None else self.shared.outer(inner_NH)
        returned_RD = back.end(on_the_way_RD)
        return y_ND.index_add(0, token_R, returned_RD * gates_R[:, None])

    @property
    def _local_experts(self) -> list[GatedMLP]:
        return list(self.experts.values())  # type: ignore[arg-type]


def expert_major(arriving_WL: Tensor) -> Tensor:
    """Rows arrive by source rank, then expert: their numbers (M) by expert, then source rank."""
    arriving_LW = arriving_WL.T
    begin_LW = (arriving_WL.reshape(-1).cumsum(0) - arriving_WL.reshape(-1)).view_as(arriving_WL).T
    place_LW = (arriving_LW.reshape(-1).cumsum(0) - arriving_LW.reshape(-1)).view_as(arriving_LW)
    shift_M = (begin_LW - place_LW).reshape(-1).repeat_interleave(arriving_LW.reshape(-1))
    return torch.arange(len(shift_M)) + shift_M


def _expected(home: ExpertHome, num_experts: int) -> Tensor:
    """1 where rank w's tokens for expert e come to this rank (W, E)."""
    placement = home.placement
    expects_WE = torch.zeros(placement.world_size, num_experts, dtype=torch.int64, device="cpu")
    for source in range(placement.world_size):
        destination_E = ExpertHome(placement, source, None).destinations()
        expects_WE[source] = (destination_E == home.rank).to(torch.int64)
    return expects_WE
