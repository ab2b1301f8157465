"""The model interface of engine, trainer and worker: ours, or a user's own in `orchestrator.model.user_model`.

Shape legend: B = rows, T = tokens in a row, N = tokens of all rows, C = tokens of a chunk, D = hidden size, V =
vocabulary, L = MoE layers, E = experts.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from orchestrator.elastic.state_spec import ParamSpec
from orchestrator.model.attention.padding import Padding
from orchestrator.model.draws import draw_uniform
from orchestrator.model.linear.low_rank import LowRankAdapter
from orchestrator.model.loss import JointLoss, LogitLoss, chunked_loss
from orchestrator.model.moe.routed_experts import RoutedExperts
from orchestrator.model.moe.routing.balance import RoutingCounts
from orchestrator.spec.model import ModelSpec


@dataclass(frozen=True)
class TokenScores:
    """Scores of the tokens that are no padding.

    Args:
        x_ND: final hidden states; of a module that returns nothing else, the logits.
        head_VD: the output matrix. None: `x_ND` are the logits.
        padding: of the rows; None where they have none.
        exits: hidden states (N, D) of the model's exits, as `x_ND`.
    """

    x_ND: Tensor
    head_VD: Tensor | None
    padding: Padding | None
    exits: tuple[Tensor, ...] = ()

    def of_tokens(self, values_BTAS: Tensor) -> Tensor:
        """Values (B, T, ...) of all positions for the tokens (N, ...)."""
        return values_BTAS.flatten(0, 1) if self.padding is None else self.padding.unpad(values_BTAS)

    def logits(self, here: slice) -> Tensor:
        """Logits (C, V) of some tokens."""
        return self.x_ND[here] if self.head_VD is None else F.linear(self.x_ND[here], self.head_VD)

    def loss(self, loss: LogitLoss) -> tuple[Tensor, Tensor]:
        """A loss, summed over the tokens, and all its sums (S,), without gradients."""
        return chunked_loss(self.x_ND, self.head_VD, loss)

    def joint_loss(self, loss: LogitLoss, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
        """The last layer's loss, with the gradients of that and of the exits' losses times their weights; and all sums
        (1 + exits, S), without gradients: the last layer's, then those of the exits."""
        joint = JointLoss(loss, (1.0, *weights), len(self.x_ND))
        x_MD = torch.cat((self.x_ND, *self.exits)) if weights else self.x_ND
        total, sums = chunked_loss(x_MD, self.head_VD, joint)
        return total, sums.view(1 + len(weights), loss.num_sums)


class TrainableModel(nn.Module, ABC):
    """A language model as one rank holds it: all dense weights and this rank's experts.

    Weights are unset until `init_weights` or a transfer fills them. Parameters and persistent buffers are training
    state: they are transferred at a rescale and saved in checkpoints.
    """

    spec: ModelSpec

    @abstractmethod
    def forward(
        self,
        inputs_BT: Tensor,
        targets_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        lengths_B: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, T, V); or, given targets, the sum of the cross-entropy over those that are not `IGNORED`, in
        nats, fp32.

        Args:
            inputs_BT: token ids. B may be 0.
            targets_BT: the next token of each, or `IGNORED`.
            documents_BT: a document number per token; given, attention stays within a document.
            lengths_B: if given, tokens of a row from this index on are padding, without targets and not routed.
        """

    @abstractmethod
    def token_losses(
        self,
        inputs_BT: Tensor,
        targets_BT: Tensor,
        lengths_B: Tensor | None = None,
        documents_BT: Tensor | None = None,
    ) -> Tensor:
        """The cross-entropy (B, T) of each target in nats, fp32; 0 where it is `IGNORED`. Arguments as of `forward`."""

    @abstractmethod
    def scores(
        self, inputs_BT: Tensor, documents_BT: Tensor | None = None, lengths_B: Tensor | None = None
    ) -> TokenScores:
        """What `forward` makes its logits or its loss of, for losses of another kind. Arguments as of `forward`."""

    @abstractmethod
    def outputs(self, *args: Any, **kwargs: Any) -> Any:
        """What a user's module returns for these arguments; of our model the logits (B, T, V) of tokens."""

    @property
    @abstractmethod
    def first_module(self) -> nn.Module:
        """The part of the model that each pass calls once, before any experts."""

    @abstractmethod
    def init_weights(self, seed: int) -> None:
        """Set the weights from the seed: the same on every rank and at every world size."""

    @torch.no_grad()
    def init_adapters(self, seed: int) -> None:
        """Let low-rank adapters begin with no effect, as in peft: B = 0, and A uniform within ± 1 / sqrt(inputs). A
        tensor's values depend on (seed, name) alone."""
        for prefix, module in self.named_modules():
            if isinstance(module, LowRankAdapter):
                draw_uniform(module.A, f"{prefix}.A", seed, 1.0 / math.sqrt(module.A.shape[1]))
                module.B.zero_()

    @property
    def moe_layers(self) -> list[RoutedExperts]:
        return [m for m in self.modules() if isinstance(m, RoutedExperts)]

    def state_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """The persistent buffers by name. Others, such as tables of positions, are rebuilt with the model."""
        kept = self.state_dict().keys()
        return ((name, buffer) for name, buffer in self.named_buffers() if name in kept)

    def routing_counts(self) -> RoutingCounts:
        """Counts of this rank's routers in its last forward pass, a training pass. The histogram of a layer whose
        router counts no margins is empty."""
        routed = self.zero_counts(next(self.parameters()).device)
        for layer, counts_E, margins_EM, masses_M, dropped, norms_E in zip(self.moe_layers, *routed.parts, strict=True):
            counts_E.copy_(layer.last_counts_E)
            layer.counts_were_read = True
            if layer.last_margins_EM is not None:
                margins_EM.copy_(layer.last_margins_EM)
            if layer.last_masses_M is not None:
                masses_M.copy_(layer.last_masses_M)
            dropped.copy_(layer.last_dropped)
            norms_E.copy_(layer.last_norms_E)
        return routed

    def zero_counts(self, device: torch.device) -> RoutingCounts:
        """Counts of routers without tokens."""
        layers = self.moe_layers
        keeps_saliency = any(layer.keeps_saliency for layer in layers)
        return RoutingCounts.zeros(len(layers), self.spec, device, keeps_saliency)

    def with_balance_losses(self, loss: Tensor, units: int | None = None) -> Tensor:
        """The loss value unchanged, with the gradients of the last forward pass's auxiliary losses added.

        Args:
            units: over which the loss is a sum. An auxiliary loss is a sum over the layer's tokens, so it is scaled to
                as many units as there are. None: units are tokens.
        """
        for moe in self.moe_layers:
            other = moe.last_balance_loss
            if other is None:
                continue
            if units is not None:
                other = other * (units / max(moe.last_num_tokens, 1))
            loss = _Besides.apply(loss, other)  # type: ignore[no-untyped-call]
        return loss


class _Besides(torch.autograd.Function):
    """Adds the gradient of another loss without changing the value: the reported loss stays the cross-entropy."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, other: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], grads[0]


def spec_of(name: str, param: Tensor) -> ParamSpec:
    """The parameter's description for layouts."""
    return ParamSpec.of(name, tuple(param.shape))


@contextmanager
def meta_device() -> Iterator[None]:
    """Context in which new tensors have no memory, unless they name a device."""
    with torch.device("meta"), _NothingDrawn():
        yield


class _NothingDrawn(TorchFunctionMode):
    """Mode in which nothing is drawn for tensors without memory: torch would import its compiler for that."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.normal_, nn.init.normal_):
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)
