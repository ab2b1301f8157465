"""The learning rate schedule: a pure function of the step, so every rank of every world uses the same value."""

import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from orchestrator.errors import EntrypointError
from orchestrator.spec.train import TrainSpec
from orchestrator.user_code import calling_user, function_of

KEY = "train.lr_scheduler.entrypoint"


def learning_rate(train: TrainSpec, step: int) -> float:
    """The learning rate of `step` (counted from 0).

    It rises linearly from lr / warmup_steps at step 0 to lr at the last step of the warm-up, then follows the kind's
    curve from lr down to final_fraction * lr at the last step of the run, and stays there. That of warmup_stable_decay
    is flat until the last `decay_steps`, and then linear (arXiv:2404.06395). A user's function gives the factor of lr.

    Raises:
        EntrypointError: the user's function can't be imported, raises, or gives no factor.
    """
    schedule = train.lr_scheduler
    if schedule.entrypoint is not None:
        return train.lr * _own_factor(schedule.entrypoint, schedule.code_dir, step, train.max_steps)
    if step < schedule.warmup_steps:
        return train.lr * ((step + 1) / schedule.warmup_steps)  # exactly lr at the end of the warm-up
    if schedule.kind == "constant":
        return train.lr
    peak_step = max(schedule.warmup_steps - 1, 0)
    if schedule.kind == "warmup_stable_decay":
        peak_step = max(train.max_steps - 1 - (schedule.decay_steps or max(1, train.max_steps // 10)), peak_step)
    progress = min(max(step - peak_step, 0) / max(train.max_steps - 1 - peak_step, 1), 1.0)
    remaining = (1.0 + math.cos(math.pi * progress)) / 2.0 if schedule.kind == "cosine" else 1.0 - progress
    return train.lr * (schedule.final_fraction + (1.0 - schedule.final_fraction) * remaining)


def decay(train: TrainSpec, step: int) -> float:
    """The learning rate of `step` over its highest, and 1 in the warm-up, which leads there."""
    schedule = train.lr_scheduler
    if schedule.entrypoint is None:
        return 1.0 if step < schedule.warmup_steps else learning_rate(train, step) / train.lr
    peak_step, peak = _own_peak(schedule.entrypoint, schedule.code_dir, train.max_steps)
    return 1.0 if step < peak_step or not peak else learning_rate(train, step) / train.lr / peak


def _own_factor(entrypoint: str, code_dir: str, step: int, num_steps: int) -> float:
    with calling_user(f"{KEY} {entrypoint} for step {step}"):
        found = _own(entrypoint, code_dir)(step, num_steps)
    try:
        factor = float("nan") if isinstance(found, bool) else float(found)
    except (TypeError, ValueError):
        factor = float("nan")
    if not math.isfinite(factor) or factor < 0:
        raise EntrypointError(
            f"{KEY} {entrypoint} returned {found!r} for step {step}", remedy="Return a number of at least 0."
        )
    return factor


@lru_cache(maxsize=8)
def _own_peak(entrypoint: str, code_dir: str, num_steps: int) -> tuple[int, float]:
    """The first step with the highest factor, and that."""
    factors = [_own_factor(entrypoint, code_dir, step, num_steps) for step in range(num_steps)]
    peak = max(factors)
    return factors.index(peak), peak


@lru_cache(maxsize=8)
def _own(entrypoint: str, code_dir: str) -> Callable[..., Any]:
    return function_of(KEY, entrypoint, Path(code_dir))
