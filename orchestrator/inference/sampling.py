"""Sampling of the next token from its logits.

Temperature, then the k likeliest tokens, then the smallest set of tokens that holds a share p of the remaining
probability (nucleus sampling, arXiv:1904.09751, section 3.1).

Shape legend: V = vocabulary.
"""

import torch
from torch import Tensor


def next_token(
    logits_V: Tensor, temperature: float, top_k: int | None, top_p: float, generator: torch.Generator
) -> int:
    """A sampled token id.

    Args:
        logits_V: fp32; -inf for excluded tokens.
        temperature: 0 for the likeliest token.
        top_k: number of candidates; None for all.
        top_p: in (0, 1]; 1 for all.
    """
    if temperature == 0.0:
        return int(logits_V.argmax())
    sorted_V, tokens_V = (logits_V / temperature).sort(descending=True, stable=True)
    if top_k is not None:
        sorted_V, tokens_V = sorted_V[:top_k], tokens_V[:top_k]
    shares_V = sorted_V.softmax(-1)
    before_V = shares_V.cumsum(-1) - shares_V  # a token is in the set if likelier tokens sum to less than p
    shares_V = shares_V.masked_fill(before_V >= top_p, 0.0)
    return int(tokens_V[torch.multinomial(shares_V, 1, generator=generator)])
