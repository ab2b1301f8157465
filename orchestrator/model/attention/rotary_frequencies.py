"""Frequencies of rotary positions, scaled for a longer context as transformers does (`modeling_rope_utils`).

Llama 3.1's: arXiv:2407.21783; YaRN: arXiv:2309.00071.
"""

import math

import torch
from torch import Tensor

from orchestrator.spec.pretrained.config_json import LINEAR, LLAMA3, RopeScalingSpec


def inverse_frequencies(
    size: int, theta: float, scaling: RopeScalingSpec | None, device: torch.device
) -> tuple[Tensor, float]:
    """Radians per position (size / 2), fp32, and the factor on cosines and sines.

    Args:
        size: of the rotated part of a head.
    """
    inverse = theta ** -(torch.arange(0, size, 2, dtype=torch.float32, device=device) / size)
    if scaling is None:
        return inverse, 1.0
    if scaling.rope_type == LINEAR:
        return inverse / scaling.factor, 1.0
    if scaling.rope_type == LLAMA3:
        return _as_llama3(inverse, scaling), 1.0
    return _as_yarn(inverse, size, theta, scaling), _yarn_factor(scaling)


def sharpness(scaling: RopeScalingSpec | None) -> float:
    """Factor on the scores of latent attention, as DeepSeek-V3 has it."""
    if scaling is None or not scaling.mscale_all_dim:
        return 1.0
    return _mscale(scaling.factor, scaling.mscale_all_dim) ** 2


def _as_llama3(inverse: Tensor, scaling: RopeScalingSpec) -> Tensor:
    """Long wavelengths are stretched, short ones stay, and those between are mixed."""
    assert scaling.original_max_position_embeddings is not None
    turns = scaling.original_max_position_embeddings * inverse / (2 * math.pi)  # within the former context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 - kept) * inverse / scaling.factor + kept * inverse


def _as_yarn(inverse: Tensor, size: int, theta: float, scaling: RopeScalingSpec) -> Tensor:
    """The same by dimension: a linear transition between those of `beta_fast` and of `beta_slow` turns."""
    length = scaling.original_max_position_embeddings
    assert length is not None
    low, high = (
        size * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    high += 0.001 * (high == low)
    dimensions = torch.arange(size // 2, dtype=torch.float32, device=inverse.device)
    kept = 1.0 - ((dimensions - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 - kept) * inverse / scaling.factor + kept * inverse


def _yarn_factor(scaling: RopeScalingSpec) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return _mscale(scaling.factor, scaling.mscale) / _mscale(scaling.factor, scaling.mscale_all_dim)
    return _mscale(scaling.factor, 1.0)


def _mscale(factor: float, strength: float) -> float:
    return 0.1 * strength * math.log(factor) + 1.0
