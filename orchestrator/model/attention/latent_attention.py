"""Causal multi-head latent attention (arXiv:2405.04434, section 2.1), as DeepSeek-V3's.

Keys and values of all heads come from one small vector per token, their latent, and the rotated part of the keys is one
for all heads. A cache holds keys and values, not latents.

Shape legend: B = rows, T = tokens in a row, D = hidden size, A = attention heads, S = width of a head's queries and
keys, R = its rotated part, W = width of a head's values, N = widths side by side.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.model.attention.grouped_query import rotate
from orchestrator.model.attention.kv_cache import LayerCache
from orchestrator.model.attention.padding import Padding
from orchestrator.model.attention.rotary_frequencies import sharpness
from orchestrator.model.linear.products import LinearProducts
from orchestrator.model.linear.structure import Structure, UnitSlices
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.pruning import HEADS

EPS = 1e-6  # of the latents' norms, whatever `rms_norm_eps` is: as in transformers


class LatentAttention(LinearProducts):
    """Takes the place of `orchestrator.model.attention.grouped_query.Attention` in a layer."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        assert spec.kv_lora_rank is not None
        heads, queries = spec.num_attention_heads, spec.num_attention_heads * spec.key_dim
        self.num_heads, self.latent_dim, self.is_interleaved = heads, spec.kv_lora_rank, spec.rope_interleave
        self.plain_dim, self.rotated_dim, self.value_dim = spec.qk_nope_head_dim, spec.qk_rope_head_dim, spec.v_head_dim
        if spec.q_lora_rank is None:
            self.query = nn.Parameter(torch.empty(queries, spec.hidden_size))
        else:
            self.query_down = nn.Parameter(torch.empty(spec.q_lora_rank, spec.hidden_size))
            self.query_down_norm = nn.RMSNorm(spec.q_lora_rank, eps=EPS)
            self.query_up = nn.Parameter(torch.empty(queries, spec.q_lora_rank))
        self.latent = nn.Parameter(torch.empty(self.latent_dim + self.rotated_dim, spec.hidden_size))
        self.latent_norm = nn.RMSNorm(self.latent_dim, eps=EPS)
        self.key_value = nn.Parameter(torch.empty(heads * (self.plain_dim + self.value_dim), self.latent_dim))
        self.output = nn.Parameter(torch.empty(spec.hidden_size, heads * self.value_dim))
        self.has_query_latent = spec.q_lora_rank is not None
        self.scale = spec.key_dim**-0.5 * sharpness(spec.rope_scaling)

    def structures(self) -> tuple[Structure, ...]:
        queries = "query_up" if self.has_query_latent else "query"
        parts = UnitSlices(queries), UnitSlices("key_value"), UnitSlices("output", dim=1)
        return (Structure(HEADS, self.num_heads, parts),)

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
        """Queries and keys (B, A, T, S), partly rotated, and values (B, A, T, W)."""
        B, T, _ = x_BTD.shape
        plain = self.plain_dim
        q_BTAS = self._queries(x_BTD).view(B, T, self.num_heads, plain + self.rotated_dim)
        if padding is not None:
            q_BTAS = padding.pad(q_BTAS[0])
        q_BATS = q_BTAS.transpose(1, 2)
        q_BATS = torch.cat((q_BATS[..., :plain], self._turn(q_BATS[..., plain:], rotary)), dim=-1)
        return q_BATS, *self._keys_values(x_BTD, rotary, padding)

    def attended(
        self,
        q_BATS: Tensor,
        k_BATS: Tensor,
        v_BATW: Tensor,
        mask_B1TT: Tensor | None,
        cache: LayerCache | None = None,
        padding: Padding | None = None,
    ) -> Tensor:
        """Means (B, T, A, W) of the values, weighted by attention, without padding (1, N, A, W)."""
        if cache is not None:
            k_BATS, v_BATW = cache.append(k_BATS, v_BATW)  # with those of earlier tokens
        y_BTAW = _attended(q_BATS, k_BATS, v_BATW, mask_B1TT, self.scale).transpose(1, 2)
        return y_BTAW if padding is None else padding.unpad(y_BTAW)[None]

    def outputs(self, y_BTAW: Tensor) -> Tensor:
        """What the layer adds to its inputs (B, T, D)."""
        B, T = y_BTAW.shape[:2]
        return self.product(y_BTAW.reshape(B, T, self.num_heads * self.value_dim), "output")

    def fill(self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], cache: LayerCache) -> None:
        """Add keys and values of tokens to the cache, without attending from them."""
        cache.append(*self._keys_values(x_BTD, rotary, None))

    def _keys_values(
        self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], padding: Padding | None
    ) -> tuple[Tensor, Tensor]:
        """Keys (B, A, T, S), partly rotated, and values (B, A, T, W)."""
        B, T, _ = x_BTD.shape
        plain = self.plain_dim
        latent_BTN = self.product(x_BTD, "latent")
        kv_BTN = self.product(self.latent_norm(latent_BTN[..., : self.latent_dim]), "key_value")
        kv_BTAN = kv_BTN.view(B, T, self.num_heads, plain + self.value_dim)
        shared_BT1R = latent_BTN[..., self.latent_dim :].view(B, T, 1, self.rotated_dim)
        if padding is not None:
            kv_BTAN, shared_BT1R = padding.pad(kv_BTAN[0]), padding.pad(shared_BT1R[0])
        kv_BATN, turned_B1TR = kv_BTAN.transpose(1, 2), self._turn(shared_BT1R.transpose(1, 2), rotary)
        k_BATS = torch.cat((kv_BATN[..., :plain], turned_B1TR.expand(-1, self.num_heads, -1, -1)), dim=-1)
        return k_BATS, kv_BATN[..., plain:]

    def _queries(self, x_BTD: Tensor) -> Tensor:
        if not self.has_query_latent:
            return self.product(x_BTD, "query")
        return self.product(self.query_down_norm(self.product(x_BTD, "query_down")), "query_up")

    def _turn(self, x_BATR: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Rotary position embedding. Where pairs that turn together are neighbours, they come apart first."""
        if self.is_interleaved:
            x_BATR = torch.cat((x_BATR[..., 0::2], x_BATR[..., 1::2]), dim=-1)
        return rotate(x_BATR, *rotary)


def _attended(q_BATS: Tensor, k_BATS: Tensor, v_BATW: Tensor, mask_B1TT: Tensor | None, scale: float) -> Tensor:
    """(B, A, T, W). With widths of zeros, as kernels that never hold all weights want equal ones."""
    size, width = q_BATS.shape[-1], v_BATW.shape[-1]
    q_BATS, k_BATS = (F.pad(each, (0, max(0, width - size))) for each in (q_BATS, k_BATS))
    y_BATN = F.scaled_dot_product_attention(
        q_BATS,
        k_BATS,
        F.pad(v_BATW, (0, max(0, size - width))),
        attn_mask=mask_B1TT,
        is_causal=mask_B1TT is None and k_BATS.shape[2] == q_BATS.shape[2],
        scale=scale,
    )
    return y_BATN[..., :width]
