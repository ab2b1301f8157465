"""A classifier of small images: each patch of an image is a token, which visits experts. For task classification.

    orchestrator run jobs/digits.yaml --local           # from the directory above jobs/

The first layer maps patches to `hidden_size`; blocks of attention and experts follow; the mean over the patches gives a
logit per class.
"""

import torch
from torch import nn

from jobs.models.dense import mlp
from orchestrator.model.moe.layer import MoELayer


class Block(nn.Module):
    """Attention between all patches, then experts or an MLP."""

    def __init__(self, size: int, num_heads: int, inner: nn.Module) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(size), nn.LayerNorm(size)
        self.qkv, self.output = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.inner = inner

    def forward(self, x):  # (rows, patches, size)
        rows, patches, size = x.shape
        heads = (rows, patches, 3, self.num_heads, size // self.num_heads)  # no -1: there may be no rows
        q, k, v = self.qkv(self.attention_norm(x)).view(heads).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.output(mixed.transpose(1, 2).reshape(rows, patches, size))
        return x + self.inner(self.mlp_norm(x))


class PatchClassifier(nn.Module):
    """Maps images (rows, height, width) to logits (rows, classes)."""

    def __init__(self, side: int, patch: int, size: int, num_classes: int, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.side, self.patch = side, patch
        self.patches = nn.Linear(patch * patch, size)
        self.places = nn.Parameter(0.02 * torch.randn((side // patch) ** 2, size))
        self.blocks = nn.ModuleList(blocks)
        self.norm, self.head = nn.LayerNorm(size), nn.Linear(size, num_classes)

    def forward(self, images):
        n, p = self.side // self.patch, self.patch
        tokens = images.view(len(images), n, p, n, p).transpose(2, 3).reshape(len(images), n * n, p * p)
        x = self.patches(tokens) + self.places
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def build(spec, vocab_size, experts) -> nn.Module:
    """`vocab_size` is the number of classes. `spec.options` has the sizes of images and patches."""
    size = spec.hidden_size
    blocks = []
    for index in range(spec.num_hidden_layers):
        is_dense = index < spec.first_k_dense_replace
        inner = mlp(size, spec.intermediate_size) if is_dense else MoELayer(spec, experts)
        blocks.append(Block(size, spec.num_attention_heads, inner))
    return PatchClassifier(spec.options["side"], spec.options["patch"], size, vocab_size, blocks)
