"""Causal grouped-query attention (arXiv:2305.13245) with rotary positions (arXiv:2104.09864).

Shape legend: B = rows, T = tokens in a row, N = tokens of all rows, D = hidden size, A = attention heads, G = key/value
heads, S = head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.model.attention.kv_cache import LayerCache
from orchestrator.model.attention.padding import Padding
from orchestrator.model.attention.rotary_frequencies import inverse_frequencies
from orchestrator.model.linear.products import LinearProducts
from orchestrator.model.linear.structure import Structure, UnitSlices
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.pretrained.config_json import RopeScalingSpec
from orchestrator.spec.pruning import HEADS


class Attention(LinearProducts):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        size = spec.head_dim
        self.num_attention_heads, self.num_key_value_heads, self.head_dim = (
            spec.num_attention_heads,
            spec.num_key_value_heads,
            size,
        )
        self.query = nn.Parameter(torch.empty(spec.num_attention_heads * size, spec.hidden_size))
        self.key = nn.Parameter(torch.empty(spec.num_key_value_heads * size, spec.hidden_size))
        self.value = nn.Parameter(torch.empty(spec.num_key_value_heads * size, spec.hidden_size))
        self.output = nn.Parameter(torch.empty(spec.hidden_size, spec.num_attention_heads * size))
        self.query_bias = nn.Parameter(torch.empty(spec.num_attention_heads * size)) if spec.attention_bias else None
        self.key_bias = nn.Parameter(torch.empty(spec.num_key_value_heads * size)) if spec.attention_bias else None
        self.value_bias = nn.Parameter(torch.empty(spec.num_key_value_heads * size)) if spec.attention_bias else None
        self.norms_all_heads = spec.qk_norm == "all_heads"
        heads = (self.num_attention_heads, self.num_key_value_heads) if self.norms_all_heads else (1, 1)
        self.query_norm, self.key_norm = (
            nn.RMSNorm(count * size, eps=spec.rms_norm_eps) if spec.qk_norm else nn.Identity() for count in heads
        )

    def structures(self) -> tuple[Structure, ...]:
        """Key/value heads, each with its query heads."""
        of_rows = ("query", "key", "value")
        parts = (*(UnitSlices(name) for name in of_rows), UnitSlices("output", dim=1))
        biases = tuple(UnitSlices(f"{name}_bias") for name in of_rows if self.query_bias is not None)
        return (Structure(HEADS, self.num_key_value_heads, parts, biases=biases),)

    def forward(
        self,
        x_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask_B1TT: Tensor | None,
        cache: LayerCache | None = None,
        padding: Padding | None = None,
    ) -> Tensor:
        return self.outputs(self.attended(*self.inputs(x_BTD, rotary, padding), mask_B1TT, cache, padding))

    def inputs(
        self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], padding: Padding | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, A, T, S), keys and values (B, G, T, S); queries and keys are rotated."""
        q_BTAS = self._heads(self.product(x_BTD, "query", self.query_bias), self.query_norm, self.num_attention_heads)
        k_BGTS, v_BGTS = self._keys_values(x_BTD, rotary, padding)
        if padding is not None:
            q_BTAS = padding.pad(q_BTAS[0])
        return rotate(q_BTAS.transpose(1, 2), *rotary), k_BGTS, v_BGTS

    def attended(
        self,
        q_BATS: Tensor,
        k_BGTS: Tensor,
        v_BGTS: Tensor,
        mask_B1TT: Tensor | None,
        cache: LayerCache | None = None,
        padding: Padding | None = None,
    ) -> Tensor:
        """Means (B, T, A, S) of the values, weighted by attention, without padding (1, N, A, S)."""
        if cache is not None:
            k_BGTS, v_BGTS = cache.append(k_BGTS, v_BGTS)  # with those of earlier tokens
        y_BATS = F.scaled_dot_product_attention(
            q_BATS,
            k_BGTS,
            v_BGTS,
            attn_mask=mask_B1TT,
            is_causal=mask_B1TT is None and k_BGTS.shape[2] == q_BATS.shape[2],
            enable_gqa=self.num_attention_heads != self.num_key_value_heads,
        )
        y_BTAS = y_BATS.transpose(1, 2)
        return y_BTAS if padding is None else padding.unpad(y_BTAS)[None]

    def outputs(self, y_BTAS: Tensor) -> Tensor:
        """What the layer adds to its inputs (B, T, D)."""
        B, T = y_BTAS.shape[:2]
        return self.product(y_BTAS.reshape(B, T, self.num_attention_heads * self.head_dim), "output")

    def fill(self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], cache: LayerCache) -> None:
        """Add keys and values of tokens to the cache, without attending from them."""
        cache.append(*self._keys_values(x_BTD, rotary, None))

    def _keys_values(
        self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], padding: Padding | None
    ) -> tuple[Tensor, Tensor]:
        """Keys, rotated, and values (B, G, T, S)."""
        k_BTGS = self._heads(self.product(x_BTD, "key", self.key_bias), self.key_norm, self.num_key_value_heads)
        v_BTGS = self._heads(self.product(x_BTD, "value", self.value_bias), None, self.num_key_value_heads)
        if padding is not None:
            k_BTGS, v_BTGS = padding.pad(k_BTGS[0]), padding.pad(v_BTGS[0])
        return rotate(k_BTGS.transpose(1, 2), *rotary), v_BTGS.transpose(1, 2)

    def _heads(self, x_BTN: Tensor, norm: nn.Module | None, num_heads: int) -> Tensor:
        """Normed heads (B, T, num_heads, S)."""
        B, T, _ = x_BTN.shape  # sizes are explicit (no -1): a forward pass on no rows must work too
        if norm is not None and self.norms_all_heads:
            x_BTN = norm(x_BTN)
        x_BTHS = x_BTN.view(B, T, num_heads, self.head_dim)
        return x_BTHS if norm is None or self.norms_all_heads else norm(x_BTHS)


def rotary_tables(
    length: int,
    rotary_size: int,
    theta: float,
    device: torch.device,
    start: int = 0,
    scaling: RopeScalingSpec | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, rotary_size) in fp32 of the positions from `start` on, for rotating the halves of a head
    against each other."""
    inverse, factor = inverse_frequencies(rotary_size, theta, scaling, device)
    positions = torch.arange(start, start + length, dtype=torch.float32, device=device)
    angles = torch.outer(positions, inverse).repeat(1, 2)
    if factor == 1.0:
        return angles.cos(), angles.sin()
    return angles.cos() * factor, angles.sin() * factor


def rotate(x_BATS: Tensor, cos_TS: Tensor, sin_TS: Tensor) -> Tensor:
    """Rotary position embedding on the first part of each head; the rest is unchanged."""
    size = cos_TS.shape[-1]
    turned, rest = x_BATS[..., :size], x_BATS[..., size:]
    half = torch.cat((-turned[..., size // 2 :], turned[..., : size // 2]), dim=-1)
    turned = (turned * cos_TS + half * sin_TS).to(x_BATS.dtype)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned
