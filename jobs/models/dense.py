"""A small dense transformer in plain torch: an example of a model of your own. See docs/own-model.md.

orchestrator run jobs/own-dense.yaml --local        # from the directory above jobs/
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, size: int, num_attention_heads: int) -> None:
        super().__init__()
        self.num_attention_heads, self.head_dim = num_attention_heads, size // num_attention_heads
        self.query_key_value = nn.Linear(size, 3 * size, bias=False)
        self.output = nn.Linear(size, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, size = x.shape  # written out below, never -1: there may be no rows
        heads = self.query_key_value(x).view(rows, length, 3, self.num_attention_heads, self.head_dim)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.output(y.transpose(1, 2).reshape(rows, length, size))


class Block(nn.Module):
    def __init__(self, size: int, num_attention_heads: int, mlp: nn.Module) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.RMSNorm(size), Attention(size, num_attention_heads)
        self.mlp_norm, self.mlp = nn.RMSNorm(size), mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    def __init__(self, vocab_size: int, size: int, max_length: int, blocks: list[Block]) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, size)
        self.positions = nn.Embedding(max_length, size)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(size)
        self.head = nn.Linear(size, vocab_size, bias=False)
        self.head.weight = self.tokens.weight  # tied
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (rows, tokens, vocab_size) for tokens (rows, tokens): all that training asks for."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def mlp(size: int, inner: int) -> nn.Module:
    return nn.Sequential(nn.Linear(size, inner), nn.GELU(), nn.Linear(inner, size))


def build(spec, vocab_size, experts):
    """`spec` is the `model` section of the job file; `experts` is of use to models with MoELayers only."""
    size = spec.hidden_size
    blocks = [
        Block(size, spec.num_attention_heads, mlp(size, spec.intermediate_size)) for _ in range(spec.num_hidden_layers)
    ]
    return Transformer(vocab_size, size, spec.options["max_length"], blocks)
