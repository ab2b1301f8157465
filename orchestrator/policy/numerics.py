"""Numerics fingerprints, of which `engine.numerics` tells what is in one: who has the same computes the same bits."""

from collections.abc import Mapping, Sequence
from typing import Any

Differences = Mapping[str, str]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """In words, by key."""
    keys = sorted(before.keys() | now.keys())
    return {key: f"{before.get(key)} -> {now.get(key)}" for key in keys if before.get(key) != now.get(key)}


def shown(differing: Mapping[str, Differences]) -> str:
    """Workers with what of their fingerprint is another: `w2, w3 (instructions: AVX512 -> AVX2)`."""
    alike: dict[str, list[str]] = {}
    for worker, differs in differing.items():
        alike.setdefault(", ".join(f"{key}: {change}" for key, change in differs.items()), []).append(worker)
    return "; ".join(f"{', '.join(workers)} ({told})" for told, workers in alike.items())


def doubt(members: Sequence[str], differing: Mapping[str, Differences], here: Differences) -> str:
    """Why steps done again here may differ with nothing wrong: whoever did them computes other bits. Empty if not.

    Args:
        members: the workers that did them.
        differing: of them, those whose numerics aren't those of the run's first worker.
        here: how this process's numerics are others than that one's.
    """
    if all(differing.get(member, {}) == here for member in members):
        return ""
    others = {member: differing[member] for member in members if member in differing}
    told = shown(others | ({"this process": here} if here else {}))
    return f"The numerics of whoever did these steps are not those here, which may be all that differs: {told}."
