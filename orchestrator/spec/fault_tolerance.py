"""The `protection` key: how often each worker's state is copied to another's memory."""

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from orchestrator.spec.section import Section, refuse

EVERY_STEP, AUTO, OFF = "every_step", "auto", "off"
RULE = 'must be every_step, "every N" (N steps), auto or off'


def _protection(value: Any) -> Any:
    if value is False:  # what YAML 1.1 makes of off
        return OFF
    if not isinstance(value, str) or not re.fullmatch(rf"{EVERY_STEP}|{AUTO}|{OFF}|every [1-9]\d{{0,5}}", value):
        raise refuse(RULE)
    return EVERY_STEP if value == "every 1" else value


Protection = Annotated[str, BeforeValidator(_protection, json_schema_input_type=str)]


def interval_of(protection: str) -> int | None:
    """Steps between two snapshots, with auto until costs are known; None where it is off."""
    if protection == OFF:
        return None
    _, _, number = protection.partition(" ")
    return int(number) if number else 1


def whole_every(protection: str, wanted: int) -> int:
    """One of so many snapshots is whole. Only those that follow one another step by step may be deltas."""
    return wanted if protection in (EVERY_STEP, AUTO) else 1


# -- The `recovery` section: what a run puts up with, and what it does about it ----------------------------------------

MAX_BUDGET = 200  # failures an hour; no more of them are kept


def _budget(default: int, what: str) -> int:
    told = f"{what}: so many an hour, the next one ends the run."
    budget: int = Field(default=default, ge=0, le=MAX_BUDGET, description=told)
    return budget


class BudgetsSpec(Section):
    """How often a run may fail in each way within an hour. Several workers lost at once are one failure."""

    worker: int = _budget(100, "Deaths of workers' processes")
    node: int = _budget(100, "Losses of whole nodes")
    network: int = _budget(100, "Connections lost between workers that live on")
    hang: int = _budget(50, "Workers that stopped answering, or kept the others waiting")
    preemption: int = _budget(200, "Nodes that were taken away with notice")
    user_error: int = _budget(3, "Errors of the user's own code")
    out_of_memory: int = _budget(10, "Workers without memory; each time the micro-batch gets smaller")
    numeric: int = _budget(5, "Explosions of the loss")
    storage: int = _budget(20, "Checkpoints that could not be written")
    corrupted: int = _budget(5, "Workers whose state had changed by itself, which verify.every looks for")
    internal: int = _budget(5, "Errors of the training loop itself")


class RecoverySpec(Section):
    """What failures lead to. Survivors of a loss go on at once, whatever is set here."""

    budgets: BudgetsSpec = Field(default=BudgetsSpec(), description="Failures an hour, by kind.")
    whole_every: int = Field(
        default=4,
        ge=1,
        le=16,
        description="Of the snapshots that follow every step one in so many holds the whole state, the others only "
        "the step's gradients, from which it is made again. 1: all are whole, which takes less memory, but more time.",
    )
    quarantine_after: int | None = Field(
        default=5,
        ge=1,
        description="A node on which workers failed so often within an hour gets no new ones, as long as there are "
        "other nodes. null: never.",
    )
    loss_explosion: float | None = Field(
        default=2.0,
        gt=1,
        description="A step whose loss is so many times the median of the 32 before it, and at least 1 nat above it, "
        "is undone and its batch left out. null: losses are not judged.",
    )
    replace_stragglers: bool = Field(
        default=False,
        description="true: a worker that is much slower than the others, for long, is replaced. It is reported anyway.",
    )


# -- The `checkpoint` section: durable copies of the training state ----------------------------------------------------


class CheckpointSpec(Section):
    """Durable copies of the training state. One after the last step is always written."""

    every: int | None = Field(
        default=None, ge=1, description="Steps between two checkpoints. null: only the final one."
    )
    keep_last: int | None = Field(
        default=None, ge=1, description="How many of the newest checkpoints are kept. null: all."
    )
    keep_best: int = Field(
        default=0,
        ge=0,
        description="How many more are kept for their validation loss, the lowest ones. Needs eval.every.",
    )


# -- The `verify` section: whether a run's steps are done again while it trains, and compared --------------------------


class VerifySpec(Section):
    """Finding results that hardware has changed. For runs with train.determinism exact."""

    every: int | None = Field(
        default=None,
        ge=1,
        description="A standby does some of the run's steps again, after its newest checkpoint, so many steps after it "
        "last began to, and compares what they led to. And each worker looks in every step whether its state is as it "
        "left it. Needs a standby, with memory for the whole state, and checkpoints. null: neither.",
    )
    steps: int = Field(
        default=8, ge=1, le=256, description="How many steps are done again each time: fewer than checkpoint.every."
    )
