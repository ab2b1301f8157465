"""The learning rate schedule: a pure function of the step, so every rank of every world uses the same value."""

import math

from orchestrator.spec.train import TrainSpec


def learning_rate(train: TrainSpec, step: int) -> float:
    """The learning rate of `step` (counted from 0).

    It rises linearly from lr / warmup_steps at step 0 to lr at the last step of the warm-up, then follows the kind's
    curve from lr down to final_fraction * lr at the last step of the run, and stays there. That of warmup_stable_decay
    is flat until the last `decay_steps`, and then linear (arXiv:2404.06395).
    """
    schedule = train.lr_scheduler
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
    return 1.0 if step < train.lr_scheduler.warmup_steps else learning_rate(train, step) / train.lr
