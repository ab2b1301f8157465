"""Selections: the experts that each token visits, given the scores of all.

- `TopKSelection`: the `num_experts_per_tok` best by score plus a correction bias.
- `TopPSelection`: as many of the best as it takes until their shares of the token's scores add up to a threshold
  (arXiv:2403.07652, section 3.1), one at least. The threshold follows the scores
  (`orchestrator.model.moe.routing.balance.next_mass`), so that tokens visit `num_experts_per_tok` experts on average.
- `ExpertChoice`: each expert takes the tokens that score highest for it (arXiv:2202.09368), as many as its share of a
  micro-batch. A choice depends on later tokens, so it is for training only.

In training `within_capacity` drops choices of experts that too many tokens of a micro-batch chose.

A choice is the id of an expert, or `num_experts` where a token visits fewer experts than others.

Shape legend: N = tokens, E = experts, K = experts per token at most, k = K - 1, C = tokens per expert, R = N * K
choices, M = bins of a histogram.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from orchestrator.model.moe.routing.balance import excess_histogram, margin_histogram, margins
from orchestrator.model.moe.routing.counting import count
from orchestrator.model.moe.routing.limit import Limit, OneOfFamily
from orchestrator.spec.model import ModelSpec


@dataclass(frozen=True)
class Selected:
    """The choices of some tokens.

    Args:
        expert_ids_NK: chosen experts, best first but for `ExpertChoice`.
        margins_EM: histogram of the tokens by their margin at each expert; None if not counted.
        masses_M: histogram of the shares of scores ahead of each choice, by their excess over the threshold; None
            without one.
    """

    expert_ids_NK: Tensor
    margins_EM: Tensor | None = None
    masses_M: Tensor | None = None


class Selection(nn.Module, ABC):
    """A rule by which tokens and experts find each other."""

    @abstractmethod
    def forward(self, scores_NE: Tensor, bias_E: Tensor, counts: bool) -> Selected:
        """The choices of tokens; no gradient passes.

        Args:
            bias_E: correction bias, added to scores for the choice only.
            counts: whether to make histograms, as for a training pass.
        """


class TopKSelection(Selection):
    """The best `num_experts_per_tok` experts.

    Args:
        limits: on the choice, the widest first.
    """

    def __init__(self, spec: ModelSpec, limits: Sequence[Limit | OneOfFamily] = ()) -> None:
        super().__init__()
        self.top_k, self._counts_margins, self.limits = (
            spec.num_experts_per_tok,
            spec.counts_margins,
            nn.ModuleList(limits),
        )

    def forward(self, scores_NE: Tensor, bias_E: Tensor, counts: bool) -> Selected:
        biased_NE = scores_NE + bias_E
        choice_NE, group_margins = biased_NE, []
        for limit in self.limits:
            choice_NE, margin_NE = limit(choice_NE)
            group_margins.append(margin_NE)
        if not (self._counts_margins and counts):
            return Selected(choice_NE.topk(self.top_k, dim=-1).indices)
        best = choice_NE.topk(self.top_k + 1, dim=-1)
        margin_NE = margins(biased_NE, best.values[:, -2:-1], best.values[:, -1:])
        for margin_of_group_NE in group_margins:
            margin_NE = torch.minimum(margin_NE, margin_of_group_NE)
        # A copy of the ids, so that the backward pass doesn't keep the rest.
        return Selected(best.indices[:, : self.top_k].contiguous(), margin_histogram(margin_NE))


class TopPSelection(Selection):
    """As many of a token's best experts as reach the threshold, 1 to `max_experts_per_tok`.

    Attributes:
        mass_offset_1: the threshold less its initial value, which is the middle between what k - 1 and k experts of
            equal scores reach. Training state (`orchestrator.model.moe.routing.balance.next_mass`).
    """

    mass_offset_1: Tensor

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self._most, self._num_experts = spec.max_experts_per_tok, spec.n_routed_experts
        self._counts_margins, self._initial = (
            spec.counts_margins,
            (spec.num_experts_per_tok - 0.5) / spec.n_routed_experts,
        )
        self.register_buffer("mass_offset_1", torch.zeros(1))

    def forward(self, scores_NE: Tensor, bias_E: Tensor, counts: bool) -> Selected:
        biased_NE = scores_NE + bias_E
        # One more than a token may visit, where there is one: the margins of the last need the first left out.
        best = biased_NE.topk(min(self._most + 1, self._num_experts), dim=-1)
        ids_NK = best.indices[:, : self._most]
        share_NK = scores_NE.gather(1, ids_NK) / (scores_NE.sum(-1, keepdim=True) + 1e-20)
        # Sums one by one: on a GPU `cumsum` of floats has other bits each time.
        ahead_KN = [*accumulate(share_NK[:, :-1].unbind(1))]
        excess_Nk = torch.stack(ahead_KN, dim=1) - (self._initial + self.mass_offset_1)
        number_N1 = 1 + (excess_Nk < 0).long().cumprod(-1).sum(-1, keepdim=True)
        is_chosen_NK = torch.arange(self._most, device=ids_NK.device) < number_N1
        ids_NK = torch.where(is_chosen_NK, ids_NK, self._num_experts)
        if not counts:
            return Selected(ids_NK)
        masses_M = excess_histogram(excess_Nk)
        if not self._counts_margins:
            return Selected(ids_NK, masses_M=masses_M)
        lowest_N1 = best.values.new_full((len(ids_NK), 1), float("-inf"))
        ranked = torch.cat([best.values, lowest_N1], dim=1)
        margin_NE = margins(biased_NE, ranked.gather(1, number_N1 - 1), ranked.gather(1, number_N1))
        return Selected(ids_NK, margin_histogram(margin_NE), masses_M)


class ExpertChoice(Selection):
    """Each expert's best tokens of a micro-batch, N * `num_experts_per_tok` / E of them, rounded up."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self._num_experts, self._top_k = spec.n_routed_experts, spec.num_experts_per_tok

    def forward(self, scores_NE: Tensor, bias_E: Tensor, counts: bool) -> Selected:
        num_tokens, num_experts = scores_NE.shape
        taken = capacity(num_tokens, self._top_k, num_experts, 1.0)
        token_CE = scores_NE.topk(taken, dim=0).indices
        is_chosen_NE = torch.zeros_like(scores_NE, dtype=torch.bool).scatter_(0, token_CE, True)
        expert_E = torch.arange(num_experts, device=scores_NE.device)
        ids_NE = torch.where(is_chosen_NE, expert_E, num_experts).sort(-1).values
        most = int(is_chosen_NE.sum(-1).amax()) if num_tokens else 1  # a GPU is waited for
        return Selected(ids_NE[:, : max(most, 1)].contiguous())


def capacity(num_tokens: int, top_k: int, num_experts: int, factor: float) -> int:
    """Tokens of a micro-batch that an expert takes: `factor` times its equal share, rounded up, at most all."""
    return min(math.ceil(num_tokens * top_k / num_experts * factor), num_tokens)


def within_capacity(expert_ids_NK: Tensor, scores_NK: Tensor, num_experts: int, most: int) -> Tensor:
    """The choices (N, K) with those dropped, by `num_experts`, that are not among the `most` of their expert with the
    highest scores; of equal scores the earlier tokens are kept."""
    ids_R = expert_ids_NK.reshape(-1)
    by_score_R = scores_NK.reshape(-1).argsort(descending=True, stable=True)
    order_R = by_score_R[ids_R[by_score_R].argsort(stable=True)]  # by expert, then by score
    counts = count(ids_R, num_experts + 1)
    first = counts.cumsum(0) - counts
    place_R = torch.arange(len(ids_R), device=ids_R.device) - first[ids_R[order_R]]
    kept_R = torch.zeros_like(ids_R, dtype=torch.bool).scatter_(0, order_R, place_R < most)
    return torch.where(kept_R.view_as(expert_ids_NK), expert_ids_NK, num_experts)


def selection_of(spec: ModelSpec, limits: Sequence[Limit | OneOfFamily] = ()) -> Selection:
    """The selection of a model's routers."""
    match spec.router.selection:
        case "top_p":
            return TopPSelection(spec)
        case "expert_choice":
            return ExpertChoice(spec)
    return TopKSelection(spec, limits)
