"""Key/value cache for decoding: each further token costs the work of one.

Shape legend: B = rows, T = tokens added, C = tokens held, G = key/value heads, S = head size.
"""

import torch
from torch import Tensor

from orchestrator.spec.model import ModelSpec


class LayerCache:
    """Cache of one layer; it holds `length` tokens.

    Attributes:
        waiting: hidden states (B, 1, D) of the tokens after these that have left the model before the layer, in order.
            Their keys and values are computed together once a token comes that runs the layer.
    """

    def __init__(self, room_BGC: tuple[int, int, int], widths: tuple[int, int], like: Tensor) -> None:
        self._keys_BGCS, self._values_BGCS = (like.new_empty(*room_BGC, width) for width in widths)
        self.length = 0
        self.waiting: list[Tensor] = []

    def append(self, k_BGTS: Tensor, v_BGTS: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys, already rotated, and values; returns all cached ones (B, G, C, S), as views.

        Raises:
            ValueError: they exceed the capacity, or tokens before them still wait.
        """
        if self.waiting:
            raise ValueError(f"{len(self.waiting)} tokens wait in the cache, which come first")
        start, stop = self.length, self.length + k_BGTS.shape[2]
        if stop > self._keys_BGCS.shape[2]:
            raise ValueError(f"{stop} tokens in a cache for {self._keys_BGCS.shape[2]}")
        self._keys_BGCS[:, :, start:stop] = k_BGTS
        self._values_BGCS[:, :, start:stop] = v_BGTS
        self.length = stop
        return self._keys_BGCS[:, :, :stop], self._values_BGCS[:, :, :stop]


class KVCache:
    """Caches of all layers.

    Args:
        batch_size: rows, all of the same length.
        capacity: largest number of tokens of a row.
        like: any weight of the model, for dtype and device.
    """

    def __init__(self, spec: ModelSpec, batch_size: int, capacity: int, like: Tensor) -> None:
        heads = spec.num_key_value_heads if spec.kv_lora_rank is None else spec.num_attention_heads
        room, widths = (batch_size, heads, capacity), (spec.key_dim, spec.value_dim)
        self.layers = [
            LayerCache(room, widths, torch.empty(0, dtype=like.dtype, device=like.device))
            for _ in range(spec.num_hidden_layers)
        ]

    @property
    def length(self) -> int:
        """Tokens in the cache: those of the first layer, which all run."""
        return self.layers[0].length
