"""Numerics fingerprints, of which `engine.numerics` tells what is in one: who has the same computes the same bits."""

from collections.abc import Mapping
from typing import Any

Differences = Mapping[str, str]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """In words, by key."""
    keys = sorted(before.keys() | now.keys())
    return {key: f"{before.get(key)} -> {now.get(key)}" for key in keys if before.get(key) != now.get(key)}


def shown(differing: Mapping[str, Differences]) -> str:
    """Workers, each with what of its fingerprint is another: `w2 (instructions: AVX512 -> AVX2)`."""
    return ", ".join(
        f"{worker} ({', '.join(f'{key}: {change}' for key, change in differs.items())})"
        for worker, differs in differing.items()
    )
