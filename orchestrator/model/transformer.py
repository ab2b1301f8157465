"""The language model: a decoder-only transformer with dense first layers and mixture-of-experts layers after them.

RMSNorm (arXiv:1910.07467), attention as in `orchestrator.model.attention`. Plain torch, independent of the engine.
`init_weights` draws weights keyed by (seed, name), so that a rank can draw its own experts without the others'.

Rows of unequal length are processed as one row of all their tokens (1, N); only attention pads them.

Shape legend: B = rows, T = tokens in a row, N = tokens of all rows, D = hidden size, V = vocabulary, C = tokens in a
cache.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from orchestrator.elastic.state_spec import adapted_by
from orchestrator.model.attention.grouped_query import Attention, rotary_tables
from orchestrator.model.attention.kv_cache import KVCache, LayerCache
from orchestrator.model.attention.latent_attention import LatentAttention
from orchestrator.model.attention.padding import Padding
from orchestrator.model.base import TokenScores, TrainableModel
from orchestrator.model.draws import draw_normal
from orchestrator.model.loss import cross_entropy, cross_entropy_sum
from orchestrator.model.moe.expert_parallel import ExpertParallelContext
from orchestrator.model.moe.experts import GatedMLP
from orchestrator.model.moe.layer import MoELayer
from orchestrator.model.moe.routing.scorers import initial_std
from orchestrator.spec.model import ModelSpec


def _as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


class Block(nn.Module):
    """Attention, then an MLP or experts, each with a norm before it and a residual connection.

    Attributes:
        part: makes of a function of this module what computes it in its place (`orchestrator.model.compiled`).
    """

    part: Callable[[Any], Any] = staticmethod(_as_it_is)

    def __init__(self, spec: ModelSpec, index: int, home: ExpertParallelContext) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(spec.hidden_size, eps=spec.rms_norm_eps)
        self.attention = Attention(spec) if spec.kv_lora_rank is None else LatentAttention(spec)
        self.mlp_norm = nn.RMSNorm(spec.hidden_size, eps=spec.rms_norm_eps)
        self._recomputes_mlp, self._draws = spec.gradient_checkpointing == "selective", spec.draws_in_forward
        self._routes_by_context = spec.router.scorer == "context" and index >= spec.first_k_dense_replace
        self.mlp: GatedMLP | MoELayer
        if index < spec.first_k_dense_replace:
            self.mlp = GatedMLP(spec.hidden_size, spec.intermediate_size)
        else:
            self.mlp = MoELayer(spec, home.of_layer(f"layers.{index}.mlp"))

    def forward(
        self,
        x_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask_B1TT: Tensor | None,
        cache: LayerCache | None = None,
        padding: Padding | None = None,
    ) -> Tensor:
        added_BTD = self._attend(x_BTD, rotary, mask_B1TT, cache, padding)
        x_BTD = x_BTD + added_BTD
        inputs = (x_BTD, added_BTD) if self._routes_by_context else (x_BTD,)  # all of them are kept
        mixed_BTD: Tensor
        if self._recomputes_mlp and torch.is_grad_enabled():
            mixed_BTD = checkpoint(self._mix, *inputs, use_reentrant=False, preserve_rng_state=self._draws)
        else:
            mixed_BTD = self._mix(*inputs)
        return x_BTD + mixed_BTD

    def _attend(
        self,
        x_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask_B1TT: Tensor | None,
        cache: LayerCache | None,
        padding: Padding | None,
    ) -> Tensor:
        part = self.part if x_BTD.numel() else _as_it_is  # code for no rows would be compiled apart
        # The positions of padding are numbers in compiled code, which would be compiled again for each batch.
        inputs_of = part(_attention_inputs) if padding is None else _attention_inputs
        q_BATS, k_BGTS, v_BGTS = inputs_of(self.attention, self.attention_norm, x_BTD, rotary, padding)
        y_BTAS = self.attention.attended(q_BATS, k_BGTS, v_BGTS, mask_B1TT, cache, padding)
        added_BTD: Tensor = part(_attention_outputs)(self.attention, y_BTAS)
        return added_BTD

    def fill(self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], cache: LayerCache) -> None:
        """Add to the cache keys and values of tokens that have left the model before this layer."""
        self.attention.fill(self.attention_norm(x_BTD), rotary, cache)

    def _mix(self, x_BTD: Tensor, *context_BTD: Tensor) -> Tensor:
        mixed_BTD: Tensor
        part = self.part if x_BTD.numel() else _as_it_is
        if isinstance(self.mlp, GatedMLP):
            mixed_BTD = part(_normed_mlp)(self.mlp, self.mlp_norm, x_BTD)
        else:
            mixed_BTD = self.mlp(part(_normed)(self.mlp_norm, x_BTD), *context_BTD)
        return mixed_BTD


def _attention_inputs(
    attention: Attention | LatentAttention,
    norm: nn.RMSNorm,
    x_BTD: Tensor,
    rotary: tuple[Tensor, Tensor],
    padding: Padding | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return attention.inputs(norm(x_BTD), rotary, padding)


def _attention_outputs(attention: Attention | LatentAttention, y_BTAS: Tensor) -> Tensor:
    return attention.outputs(y_BTAS)


def _normed(norm: nn.RMSNorm, x_BTD: Tensor) -> Tensor:
    normed_BTD: Tensor = norm(x_BTD)
    return normed_BTD


def _normed_mlp(mlp: GatedMLP, norm: nn.RMSNorm, x_BTD: Tensor) -> Tensor:
    mixed_BTD: Tensor = mlp(norm(x_BTD))
    return mixed_BTD


@dataclass(frozen=True)
class Start:
    """What the layers get of some tokens.

    Args:
        x_BTD: embeddings; of rows with padding (1, N, D).
        rotary: tables of their positions.
        mask_B1TC: true where a token may attend; None: to all before it.
        padding: that was left out.
    """

    x_BTD: Tensor
    rotary: tuple[Tensor, Tensor]
    mask_B1TC: Tensor | None
    padding: Padding | None


class MoELanguageModel(TrainableModel):
    """The project's own model.

    Args:
        vocab_size: V, from the tokenizer.
        home: placement of the experts, seen from this rank.

    Attributes:
        head_product: computes logits of final hidden states in place of a product with `head`; None: that.
        head_inputs: what is done to final hidden states before other products with `head`; None: nothing.
    """

    def __init__(self, spec: ModelSpec, vocab_size: int, home: ExpertParallelContext) -> None:
        super().__init__()
        self.spec = spec
        self.embedding = nn.Embedding(vocab_size, spec.hidden_size, _weight=torch.empty(vocab_size, spec.hidden_size))
        self.layers = nn.ModuleList(Block(spec, index, home) for index in range(spec.num_hidden_layers))
        self.norm = nn.RMSNorm(spec.hidden_size, eps=spec.rms_norm_eps)
        self.head = nn.Parameter(torch.empty(vocab_size, spec.hidden_size))
        self.head_product: Callable[[Tensor], Tensor] | None = None
        self.head_inputs: Callable[[Tensor], Tensor] | None = None

    def forward(
        self,
        inputs_BT: Tensor,
        targets_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        lengths_B: Tensor | None = None,
    ) -> Tensor:
        if targets_BT is not None:
            scores = self.scores(inputs_BT, documents_BT, lengths_B)
            return cross_entropy_sum(scores.x_ND, self.head, scores.of_tokens(targets_BT))
        start = self.start(inputs_BT, documents_BT, lengths_B)
        logits_BTV = self.logits(self._run_layers(start)[-1])
        return logits_BTV if start.padding is None else start.padding.pad(logits_BTV[0])

    def scores(
        self, inputs_BT: Tensor, documents_BT: Tensor | None = None, lengths_B: Tensor | None = None
    ) -> TokenScores:
        start = self.start(inputs_BT, documents_BT, lengths_B)
        *exits_ND, x_ND = (self.read(x_BTD) for x_BTD in self._run_layers(start))
        return TokenScores(x_ND, self.head, start.padding, tuple(exits_ND))

    def read(self, x_BTD: Tensor) -> Tensor:
        """Hidden states (N, D) as products with `head` take them."""
        x_BTD = self.norm(x_BTD)
        x_BTD = x_BTD if self.head_inputs is None else self.head_inputs(x_BTD)
        return x_BTD.reshape(-1, x_BTD.shape[-1])

    def token_losses(
        self,
        inputs_BT: Tensor,
        targets_BT: Tensor,
        lengths_B: Tensor | None = None,
        documents_BT: Tensor | None = None,
    ) -> Tensor:
        scores = self.scores(inputs_BT, documents_BT, lengths_B)
        loss_N = cross_entropy(scores.x_ND, self.head, scores.of_tokens(targets_BT))
        return loss_N.view(targets_BT.shape) if scores.padding is None else scores.padding.pad(loss_N)

    def outputs(self, *args: Any, **kwargs: Any) -> Tensor:
        logits_BTV: Tensor = self(*args, **kwargs)
        return logits_BTV

    @property
    def first_module(self) -> nn.Module:
        return self.embedding

    @property
    def blocks(self) -> Iterator[Block]:
        """The layers in order."""
        return (layer for layer in self.layers if isinstance(layer, Block))

    def start(
        self, inputs_BT: Tensor, documents_BT: Tensor | None = None, lengths_B: Tensor | None = None, before: int = 0
    ) -> Start:
        """What the layers get.

        Args:
            before: tokens of each row in the cache, which these follow; without documents and lengths.
        """
        length = inputs_BT.shape[1]
        rotary = self.rotary(length, before, inputs_BT.device)
        mask_B1TC = None if documents_BT is None else within_documents(documents_BT)
        if before and length > 1:  # each token attends to all earlier ones; a single token needs no mask
            seen_TC = torch.ones(length, before + length, dtype=torch.bool, device=inputs_BT.device)
            mask_B1TC = seen_TC.tril(before)[None, None]
        padding = None if lengths_B is None else Padding.of(lengths_B, length)
        if padding is not None:
            inputs_BT = padding.unpad(inputs_BT)[None]
        return Start(self._embedded(inputs_BT), rotary, mask_B1TC, padding)

    def rotary(self, length: int, before: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Tables of `length` positions after `before` others."""
        spec = self.spec
        return rotary_tables(length, spec.rotary_size, spec.rope_theta, device, before, spec.rope_scaling)

    @torch.no_grad()
    def extend(self, inputs_BT: Tensor, cache: KVCache) -> Tensor:
        """Logits (B, V) after the last of some tokens that follow those in the cache; adds the tokens to the cache."""
        start = self.start(inputs_BT, before=cache.length)
        x_BTD = start.x_BTD
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            x_BTD = layer(x_BTD, start.rotary, start.mask_B1TC, layer_cache)
        return self.logits(x_BTD[:, -1])

    def logits(self, x_XD: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., D) after a layer."""
        x_XD = self.norm(x_XD)
        return F.linear(x_XD, self.head) if self.head_product is None else self.head_product(x_XD)

    def _embedded(self, inputs_BT: Tensor) -> Tensor:
        """Embeddings for the first layer. Scaled (arXiv:1706.03762, section 3.4), so that the differences between
        tokens outweigh the layers' first outputs, which are nearly the same for all tokens."""
        embedded_BTD: Tensor = self.embedding(inputs_BT)
        return embedded_BTD * self.spec.embedding_scale

    def _run_layers(self, start: Start) -> tuple[Tensor, ...]:
        """Run all blocks, keeping activations for the backward pass according to `gradient_checkpointing`. Returns
        hidden states (B, T, D), or (1, N, D) without padding: those of exits, then those after the last layer."""
        exits = () if self.spec.exits is None else self.spec.exits.layers
        left: tuple[Tensor, ...] = ()

        def run(x_BTD: Tensor, layers: range) -> tuple[Tensor, ...]:
            states = []
            for index in layers:
                x_BTD = self.layers[index](x_BTD, start.rotary, start.mask_B1TC, None, start.padding)
                if index + 1 in exits:
                    states.append(x_BTD)
            return (*states, x_BTD)

        if self.spec.gradient_checkpointing in ("none", "selective") or not torch.is_grad_enabled():
            return run(start.x_BTD, range(len(self.layers)))
        x_BTD, draws = start.x_BTD, self.spec.draws_in_forward
        for segment in segments(len(self.layers), self.spec.gradient_checkpointing):
            *states, x_BTD = checkpoint(run, x_BTD, segment, use_reentrant=False, preserve_rng_state=draws)
            left = (*left, *states)
        return (*left, x_BTD)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Normal weights with std `initializer_range`, scaled down by depth where they write into the residual stream
        (GPT-2), ones for norms, zeros for biases. A tensor's values depend on (seed, name) alone."""
        residual_std = self.spec.initializer_range / (2 * self.spec.num_hidden_layers) ** 0.5
        for name, param in self.named_parameters():
            if adapted_by(name) is not None:
                continue
            if "norm" in name or name.endswith("_bias"):
                param.fill_(1.0 if "norm" in name else 0.0)
                continue
            std = residual_std if name.endswith((".output", ".down")) else initial_std(name, self.spec)
            draw_normal(param, name, seed, std)
        self.init_adapters(seed)
        for layer in self.moe_layers:
            for buffer in (layer.correction_bias_E, layer.mass_offset_1):
                if buffer is not None:
                    buffer.zero_()


def segments(num_layers: int, recompute: str) -> list[range]:
    """Runs of layers of which only the input is kept: single ones, or about sqrt(L) runs of about sqrt(L) layers, so
    that activations held at once grow with the root of the depth (Chen et al., arXiv:1604.06174, section 4.1)."""
    size = 1 if recompute == "full" else math.isqrt(num_layers - 1) + 1
    return [range(start, min(start + size, num_layers)) for start in range(0, num_layers, size)]


def within_documents(documents_BT: Tensor) -> Tensor:
    """Mask (B, 1, T, T), true where a token may attend: not ahead, not into another document."""
    T = documents_BT.shape[1]
    causal_TT = torch.ones(T, T, dtype=torch.bool, device=documents_BT.device).tril()
    return ((documents_BT[:, :, None] == documents_BT[:, None, :]) & causal_TT)[:, None]
