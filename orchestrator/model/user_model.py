"""A user's own model: `model: {entrypoint: "package.module:build"}`.

    def build(spec: ModelSpec, vocab_size: int, experts: ExpertParallelContext) -> nn.Module

The module that `build` returns maps tokens (B, T) to logits (B, T, V), or whatever a task gives it to whatever the task
takes; `UserModel` adds the loss and the rest of the interface that training needs. docs/own-model.md is the guide for
users.

Shape legend: B = rows, T = tokens in a row, V = vocabulary.
"""

import inspect
import traceback
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.errors import EntrypointError
from orchestrator.model.attention.padding import Padding
from orchestrator.model.base import TokenScores, TrainableModel
from orchestrator.model.draws import draw_normal
from orchestrator.model.loss import IGNORED
from orchestrator.model.moe.expert_parallel import ExpertParallelContext
from orchestrator.model.moe.routed_experts import RoutedExperts
from orchestrator.model.moe.routing.scorers import initial_std
from orchestrator.model.user_entrypoint import built
from orchestrator.model.user_rules import broken_rules, shown
from orchestrator.spec.model import ModelSpec
from orchestrator.user_code import calling_user

DOCUMENTS = "documents_BT"  # parameter of `forward` by which attention stays within documents


class UserModel(TrainableModel):
    """Adapts a user's module to the training interface.

    Args:
        spec: names the entrypoint, and is passed to it.
        vocab_size: V, from the tokenizer.
        home: placement of the experts, seen from this rank.

    Raises:
        EntrypointError: the entrypoint can't be imported, fails, or builds a model that can't be trained.
    """

    def __init__(self, spec: ModelSpec, vocab_size: int, home: ExpertParallelContext) -> None:
        super().__init__()
        self.spec, self.vocab_size = spec, vocab_size
        self.model = built(spec, vocab_size, home, seed=0)
        self._takes_documents = DOCUMENTS in _parameters(self.model.forward)
        broken = list(broken_rules(self, home))
        if broken:
            raise EntrypointError(
                "\n".join(f"the model of {spec.origin}: {rule}" for rule in broken),
                remedy="docs/own-model.md lists the requirements on a model of your own.",
            )

    def forward(
        self,
        inputs_BT: Tensor,
        targets_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        lengths_B: Tensor | None = None,
    ) -> Tensor:
        logits_BTV, _ = self._routed(inputs_BT, documents_BT, lengths_B)
        if targets_BT is None:
            return logits_BTV
        return self._cross_entropy(logits_BTV, targets_BT, "sum")

    def token_losses(
        self,
        inputs_BT: Tensor,
        targets_BT: Tensor,
        lengths_B: Tensor | None = None,
        documents_BT: Tensor | None = None,
    ) -> Tensor:
        logits_BTV, _ = self._routed(inputs_BT, documents_BT, lengths_B)
        return self._cross_entropy(logits_BTV, targets_BT, "none").view_as(targets_BT)

    def scores(
        self, inputs_BT: Tensor, documents_BT: Tensor | None = None, lengths_B: Tensor | None = None
    ) -> TokenScores:
        logits_BTV, padding = self._routed(inputs_BT, documents_BT, lengths_B)
        logits_NV = logits_BTV.flatten(0, 1) if padding is None else padding.unpad(logits_BTV)
        return TokenScores(logits_NV, None, padding)

    def outputs(self, *args: Any, **kwargs: Any) -> Any:
        for layer in self.moe_layers:
            layer.real_N = None
        return self.model(*args, **kwargs)

    @property
    def first_module(self) -> nn.Module:
        return self.model

    def _cross_entropy(self, logits_BTV: Tensor, targets_BT: Tensor, reduction: str) -> Tensor:
        logits_NV = logits_BTV.reshape(-1, self.vocab_size).float()
        return F.cross_entropy(logits_NV, targets_BT.reshape(-1), ignore_index=IGNORED, reduction=reduction)

    def _routed(
        self, inputs_BT: Tensor, documents_BT: Tensor | None, lengths_B: Tensor | None
    ) -> tuple[Tensor, Padding | None]:
        """Logits (B, T, V), for which tokens that are padding are not routed, and that padding."""
        padding = None if lengths_B is None else Padding.of(lengths_B, inputs_BT.shape[1])
        for layer in self.moe_layers:
            layer.real_N = None if padding is None else padding.place_N
        return self._logits(inputs_BT, documents_BT), padding

    def _logits(self, inputs_BT: Tensor, documents_BT: Tensor | None) -> Tensor:
        if documents_BT is None:
            logits_BTV: Tensor = self.model(inputs_BT)
        elif self._takes_documents:
            logits_BTV = self.model(inputs_BT, **{DOCUMENTS: documents_BT})
        else:
            raise EntrypointError(
                f"data.isolate_documents is true, and the model of {self.spec.origin} has no parameter {DOCUMENTS} "
                "in its forward, by which attention would stay within documents",
                remedy=f"Write `def forward(self, tokens_BT, {DOCUMENTS}=None)` and use it, or turn isolation off.",
            )
        wanted = (*inputs_BT.shape, self.vocab_size)
        if not isinstance(logits_BTV, Tensor) or tuple(logits_BTV.shape) != wanted:
            is_tensor = isinstance(logits_BTV, Tensor)
            got = f"a tensor of shape {tuple(logits_BTV.shape)}" if is_tensor else f"a {type(logits_BTV).__name__}"
            raise EntrypointError(
                f"the forward of {self.spec.origin} returned {got} for tokens of shape {tuple(inputs_BT.shape)}",
                remedy=f"It must return logits (rows, tokens, vocab_size), here {wanted}, also on no rows, where view "
                "and reshape can't guess a -1.",
            )
        return logits_BTV

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Dense weights as the user's module makes them; those of MoE layers as in our model.

        Dense weights are copied from a second instance that holds no experts. So what `build` draws depends on the seed
        alone, however many experts this rank holds; a module's own `init_weights(seed)` is called on it too.
        """
        with next(self.parameters()).device:
            twin = built(self.spec, self.vocab_size, _no_experts(self.spec), seed)
            if "seed" in _parameters(getattr(twin, "init_weights", None)):
                with calling_user(f"init_weights of {self.spec.origin}"):
                    twin.init_weights(seed)  # type: ignore[operator]
        drawn = self._draw_layers(seed)
        made = {**dict(twin.named_parameters("model")), **dict(twin.named_buffers("model"))}
        mine = {n: t for n, t in (*self.model.named_parameters("model"), *self.state_buffers()) if n not in drawn}
        if missing := [name for name in mine if name not in made]:
            raise EntrypointError(
                f"{self.spec.origin} builds {shown(missing)} only where it is given experts",
                remedy="Outside of MoELayers it must build the same on every rank.",
            )
        for name, tensor in mine.items():
            tensor.copy_(made[name])

    def _draw_layers(self, seed: int) -> set[str]:
        """Draw the weights of MoE layers. Returns the names of their tensors."""
        residual_std = self.spec.initializer_range
        if self.spec.entrypoint is not None:  # transformers draws all alike
            residual_std /= (2 * self.spec.num_hidden_layers) ** 0.5
        names, buffers = set[str](), dict(self.state_buffers())
        for prefix, layer in self.named_modules():
            if not isinstance(layer, RoutedExperts):
                continue
            for name, param in layer.named_parameters(prefix):
                draw_normal(param, name, seed, residual_std if name.endswith(".down") else initial_std(name, self.spec))
                names.add(name)
            for name in buffers.keys() & dict(layer.named_buffers(prefix)).keys():
                buffers[name].zero_()
                names.add(name)
        return names


def _no_experts(spec: ModelSpec) -> ExpertParallelContext:
    """A rank without experts: all of them are on another one."""
    return ExpertParallelContext(ExpertPlacement(spec.n_routed_experts, 2, ((0,),) * spec.n_routed_experts), 1, None)


def _parameters(function: object) -> Collection[str]:
    """Names of a function's parameters; empty if it is not callable."""
    return inspect.signature(function).parameters if callable(function) else ()


def raised_by_forward(error: BaseException) -> bool:
    """Whether `error` was raised within the forward pass of a user's module."""
    passes = (UserModel._logits.__code__, UserModel.outputs.__code__)
    return any(frame.f_code in passes for frame, _ in traceback.walk_tb(error.__traceback__))
