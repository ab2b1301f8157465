"""Early exits at inference: a token leaves the model at the first exit that predicts nearly what the last layer would.

How far an exit's prediction is from the last layer's is estimated from its hidden state alone, by a linear function
that was fitted on held-out rows. So an exit costs a product with a vector, not one with the output matrix. Later layers
compute only keys and values of a token that has left, from its hidden state at the exit, so that later tokens can
attend to it (CALM, arXiv:2207.07061, section 3.1).

Shape legend: B = rows, T = tokens in a row, N = tokens of all rows, D = hidden size, V = vocabulary, X = exits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from orchestrator.model.base import TokenScores
from orchestrator.model.kv_cache import KVCache
from orchestrator.model.transformer import MoELanguageModel, Start


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
        self._model, self._rule = model, rule
        self._exits = {layer: index for index, layer in enumerate(model.spec.exits.layers)}

    @torch.no_grad()
    def extend(self, inputs_B1: Tensor, cache: KVCache) -> tuple[Tensor, Tensor]:
        """Logits (B, V) after one token that follows those in the cache, and the layers (B,) that it has run; adds the
        token to the cache. A layer is skipped only where all rows have left."""
        x_B1D, layers_B1 = self._run(self._model.start(inputs_B1, before=cache.length), cache)
        return self._model.logits(x_B1D[:, -1]), layers_B1[:, 0]

    @torch.no_grad()
    def scores(
        self, inputs_BT: Tensor, documents_BT: Tensor | None = None, lengths_B: Tensor | None = None
    ) -> tuple[TokenScores, Tensor]:
        """The scores that tokens would have if they were generated one by one, and the layers (N,) that they run.
        Arguments as of `TrainableModel.forward`."""
        start = self._model.start(inputs_BT, documents_BT, lengths_B)
        x_BTD, layers_BT = self._run(start)
        return TokenScores(self._model.read(x_BTD), self._model.head, start.padding), layers_BT.flatten()

    def _run(self, start: Start, cache: KVCache | None = None) -> tuple[Tensor, Tensor]:
        """Hidden states (B, T, D) of tokens where they leave, and the layers (B, T) that they have run."""
        x_BTD, num_layers = start.x_BTD, len(self._model.layers)
        left_BT = torch.zeros(x_BTD.shape[:2], dtype=torch.bool, device=x_BTD.device)
        layers_BT = torch.full_like(left_BT, num_layers, dtype=torch.int64)
        for index, layer in enumerate(self._model.blocks):
            layer_cache = None if cache is None else cache.layers[index]
            if bool(left_BT.all()):
                if layer_cache is not None:
                    layer.pass_by(x_BTD, start.rotary, layer_cache)
                continue
            after_BTD = layer(x_BTD, start.rotary, start.mask_B1TC, layer_cache, start.padding)
            x_BTD = torch.where(left_BT[..., None], x_BTD, after_BTD)
            if (exit_index := self._exits.get(index + 1)) is not None:
                estimates_N = self._rule.estimates(self._model.read(x_BTD), exit_index)
                leaves_BT = (estimates_N.view_as(left_BT) <= self._rule.threshold) & ~left_BT
                layers_BT[leaves_BT] = index + 1
                left_BT = left_BT | leaves_BT
        return x_BTD, layers_BT
