"""Early exits at inference: a token leaves the model at the first exit that predicts nearly what the last layer would.

How far an exit's prediction is from the last layer's is estimated from its hidden state alone, by a linear function
that was fitted on held-out rows. So an exit costs a product with a vector, not one with the output matrix. Later layers
compute only keys and values of a token that has left, from its hidden state at the exit, so that later tokens can
attend to it (CALM, arXiv:2207.07061, section 3.1).

Shape legend: B = rows, T = tokens in a row, N = tokens of all rows, D = hidden size, V = vocabulary, X = exits.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from orchestrator.model.attention.kv_cache import KVCache, LayerCache
from orchestrator.model.base import TokenScores
from orchestrator.model.loss import IGNORED
from orchestrator.model.transformer import Block, MoELanguageModel, Start


@dataclass(frozen=True)
class ExitRule:
    """Which tokens leave at which exit.

    Args:
        weights_XD, biases_X: fp32; with an exit's normed hidden state they estimate the root of the divergence
            KL(last layer || exit) of the next token, in nats.
        threshold: a token leaves where the estimate isn't above it; -inf: none leave, inf: all leave at the first exit.
    """

    weights_XD: Tensor
    biases_X: Tensor
    threshold: float

    def estimates(self, x_XSD: Tensor, exit_index: int) -> Tensor:
        """Estimates (...) of hidden states (..., D) at an exit."""
        return x_XSD.float() @ self.weights_XD[exit_index] + self.biases_X[exit_index]


class EarlyExit:
    """A model of which tokens leave early.

    Args:
        model: with exits.
    """

    def __init__(self, model: MoELanguageModel, rule: ExitRule) -> None:
        assert model.spec.exits is not None
        device = model.head.device
        self._rule = replace(rule, weights_XD=rule.weights_XD.to(device), biases_X=rule.biases_X.to(device))
        self._model = model
        self._exits = {layer: index for index, layer in enumerate(model.spec.exits.layers)}

    @torch.no_grad()
    def begin(self, inputs_BT: Tensor, cache: KVCache) -> Tensor:
        """Logits (B, V) after the last of some tokens that follow those in the cache, and run all layers, as a prompt
        does; adds the tokens to the cache."""
        start = self._model.start(inputs_BT, before=cache.length)
        x_BTD, _ = self._run(start, None, cache)
        return self._model.logits(x_BTD[:, -1])

    @torch.no_grad()
    def extend(self, inputs_B1: Tensor, cache: KVCache) -> tuple[Tensor, Tensor]:
        """Logits (B, V) after one token that follows those in the cache and may leave early, and the layers (B,) that
        it has run; adds the token to the cache. A layer is skipped only where all rows have left."""
        may_leave_B1 = torch.ones_like(inputs_B1, dtype=torch.bool)
        x_B1D, layers_B1 = self._run(self._model.start(inputs_B1, before=cache.length), may_leave_B1, cache)
        return self._model.logits(x_B1D[:, -1]), layers_B1[:, 0]

    @torch.no_grad()
    def scores(
        self,
        inputs_BT: Tensor,
        targets_BT: Tensor,
        documents_BT: Tensor | None = None,
        lengths_B: Tensor | None = None,
    ) -> tuple[TokenScores, Tensor]:
        """The scores that tokens would have if they were generated one by one, and the layers (N,) that they run.
        Tokens that aren't themselves a target, such as those of prompts, run all layers. Arguments as of
        `TrainableModel.forward`."""
        start = self._model.start(inputs_BT, documents_BT, lengths_B)
        has_target_BT = targets_BT != IGNORED
        may_leave_BT = has_target_BT.clone()
        may_leave_BT[:, 1:] &= has_target_BT[:, :-1]
        may_leave_BT[:, :1] = False
        if start.padding is not None:
            may_leave_BT = start.padding.unpad(may_leave_BT)[None]
        x_BTD, layers_BT = self._run(start, may_leave_BT)
        return TokenScores(self._model.read(x_BTD), self._model.head, start.padding), layers_BT.flatten()

    def _run(self, start: Start, may_leave_BT: Tensor | None, cache: KVCache | None = None) -> tuple[Tensor, Tensor]:
        """Hidden states (B, T, D) of tokens where they leave, and the layers (B, T) that they have run.

        Args:
            may_leave_BT: false for tokens that run all layers; None: all do.
        """
        x_BTD, left_BT, have_all_left = start.x_BTD, None, False
        layers_BT = torch.full(x_BTD.shape[:2], len(self._model.layers), device=x_BTD.device)
        for index, layer in enumerate(self._model.blocks):
            layer_cache = None if cache is None else cache.layers[index]
            if have_all_left:
                if layer_cache is not None:
                    layer_cache.waiting.append(x_BTD)
                continue
            if layer_cache is not None:
                self._fill(layer, layer_cache)
            after_BTD = layer(x_BTD, start.rotary, start.mask_B1TC, layer_cache, start.padding)
            x_BTD = after_BTD if left_BT is None else torch.where(left_BT[..., None], x_BTD, after_BTD)
            exit_index = self._exits.get(index + 1)
            if exit_index is None or may_leave_BT is None:
                continue
            estimates_N = self._rule.estimates(self._model.read(x_BTD), exit_index)
            leaves_BT = (estimates_N.view_as(layers_BT) <= self._rule.threshold) & may_leave_BT
            if bool(leaves_BT.any()):
                layers_BT[leaves_BT] = index + 1
                may_leave_BT = may_leave_BT & ~leaves_BT
                left_BT = leaves_BT if left_BT is None else left_BT | leaves_BT
                have_all_left = bool(left_BT.all())
        return x_BTD, layers_BT

    def _fill(self, layer: Block, cache: LayerCache) -> None:
        """Compute keys and values of the tokens that wait for a token that runs the layer."""
        if cache.waiting:
            x_BTD = torch.cat(cache.waiting, dim=1)
            cache.waiting.clear()
            layer.fill(x_BTD, self._model.rotary(x_BTD.shape[1], cache.length, x_BTD.device), cache)
