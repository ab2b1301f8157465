"""Scorers: a router's logits, one per expert, for each token. Computed in fp32 at any precision of the model.

Each depends on its token alone, or on what attention brought the token from earlier ones, so logits are the same in
every world.

Shape legend: N = tokens, D = hidden size, E = experts, R = width of a query, H = heads of a router.
"""

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.spec.model import ModelSpec


class Scorer(nn.Module, ABC):
    """A module that scores all experts."""

    @abstractmethod
    def forward(self, x_ND: Tensor, context_ND: Tensor | None = None) -> Tensor:
        """Logits (N, E) in fp32.

        Args:
            context_ND: what the layer's attention has added to each token; None: the caller has no attention.
        """


class LinearScorer(Scorer):
    """One vector per expert: x Wᵀ."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(spec.n_routed_experts, spec.hidden_size))

    def forward(self, x_ND: Tensor, context_ND: Tensor | None = None) -> Tensor:
        return F.linear(x_ND.float(), self.weight.float())


class AttentionScorer(Scorer):
    """Attention of a token over keys of the experts (arXiv:1706.03762, section 3.2.1): (x Qᵀ) Kᵀ / √R, of rank R.

    The scale is such that a new router's logits vary as those of a linear one, and queries are drawn so wide
    (`initial_std`) that an update moves logits as fast. It is a linear scorer of lower rank, as which it is exported
    (`orchestrator.checkpoint.hf.export`).
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        rank = spec.router.rank
        self.query = nn.Parameter(torch.empty(rank, spec.hidden_size))
        self.keys = nn.Parameter(torch.empty(spec.n_routed_experts, rank))
        self._scale = spec.router_key_scale

    def forward(self, x_ND: Tensor, context_ND: Tensor | None = None) -> Tensor:
        query_NR = F.linear(x_ND.float(), self.query.float())
        return F.linear(query_NR, self.keys.float() * self._scale)


class ContextScorer(Scorer):
    """Attention over keys of the experts with several heads, whose queries also come from the token's context: what the
    layer's attention has added to it, normalized.

    A head's logits are those of an `AttentionScorer`; an expert's is the log of the mean of exp(logit) over the heads.
    So an expert that one head wants is chosen, and no linear scorer is equal.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.num_heads, rank, size = spec.router.num_heads, spec.router.rank, spec.hidden_size
        self.query = nn.Parameter(torch.empty(self.num_heads * rank, size))
        self.context_query = nn.Parameter(torch.empty(self.num_heads * rank, size))
        self.keys = nn.Parameter(torch.empty(self.num_heads * spec.n_routed_experts, rank))
        self._scale, self._eps = spec.router_key_scale, spec.rms_norm_eps

    def forward(self, x_ND: Tensor, context_ND: Tensor | None = None) -> Tensor:
        if context_ND is None:
            raise ValueError(
                "the router's scorer is context, and the layer was called without context; call "
                "MoELayer(x, context) with what attention has added to x, or set model.router.scorer to attention"
            )
        context_ND = F.rms_norm(context_ND.float(), context_ND.shape[-1:], eps=self._eps)
        query_ND = F.linear(x_ND.float(), self.query.float()) + F.linear(context_ND, self.context_query.float())
        rank = self.keys.shape[1]
        query_HNR = query_ND.view(len(x_ND), self.num_heads, rank).transpose(0, 1)
        keys_HRE = (self.keys.float() * self._scale).view(self.num_heads, -1, rank).transpose(1, 2)
        logits_HNE = query_HNR @ keys_HRE
        return logits_HNE.logsumexp(0) - math.log(self.num_heads)


def initial_std(name: str, spec: ModelSpec) -> float:
    """Standard deviation of the initial weights of a parameter of any module.

    That of queries is larger by √R. An update of Adam moves each weight by about the learning rate, so a logit by up to
    that times |x|₁ |s k|₁ for R entries of the query, where it is |x|₁ of a linear router: with narrow queries, of
    which keys are multiplied by more to give the same logits, tokens change experts faster than a bias follows
    (docs/routers.md).
    """
    is_query = name.endswith((".scorer.query", ".scorer.context_query"))
    return spec.initializer_range * (spec.router.rank**0.5 if is_query else 1.0)


SCORERS: dict[str, type[Scorer]] = {"linear": LinearScorer, "attention": AttentionScorer, "context": ContextScorer}


def scorer_of(spec: ModelSpec) -> Scorer:
    """The scorer of a model's routers, with unset weights."""
    return SCORERS[spec.router.scorer](spec)
