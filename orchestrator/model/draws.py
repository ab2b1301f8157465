"""Random values that depend on a seed and a name alone, so the same on whichever rank draws them."""

import hashlib

import torch
from torch import Tensor


@torch.no_grad()
def draw_normal(param: Tensor, name: str, seed: int, std: float) -> None:
    """Draw normal values that depend on (seed, name) alone, so a rank can draw its own experts without the others'."""
    generator = torch.Generator().manual_seed(_key(seed, name))
    param.copy_(torch.empty(param.shape, device=generator.device).normal_(0.0, std, generator=generator))


@torch.no_grad()
def draw_uniform(param: Tensor, name: str, seed: int, bound: float) -> None:
    """Draw values within ± bound, as `draw_normal` does."""
    generator = torch.Generator().manual_seed(_key(seed, name))
    param.copy_(torch.empty(param.shape, device=generator.device).uniform_(-bound, bound, generator=generator))


def seed_draws(seed: int, step: int, micro_batch: int) -> None:
    """Seed torch's generators for the pass of one micro-batch: the same on whichever rank runs it."""
    key = _key(seed, f"step {step}, micro-batch {micro_batch}")
    torch.default_generator.manual_seed(key)  # `torch.manual_seed` formats the stack for each absent kind of GPU
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(key)


def _key(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "little")
