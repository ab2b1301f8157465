"""The sections `protection`, `recovery`, `checkpoint` and `verify`: what a failure may cost, and the response to it."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from orchestrator.spec.keys.section import Broken, Path, Section, refuse

AUTO, NONE = "auto", "none"
FINISHED, COMMITTED = "finished", "committed"
MAX_UNPUBLISHED = 2000  # steps whose records members keep, and hand over in a rescale, until a checkpoint includes them


def _every(value: Any) -> Any:
    if value not in (AUTO, NONE) and (type(value) is not int or value < 1):
        raise refuse("must be a number of steps, at least 1, auto or none")
    return value


EveryForm = Annotated[int, Field(ge=1)] | Literal["auto", "none"]
Every = Annotated[int | str, BeforeValidator(_every, json_schema_input_type=EveryForm)]

# -- The `protection` section: copies of each worker's state in another worker's memory --------------------------------


class ProtectionSpec(Section):
    """Snapshots: copies of each worker's state in another worker's memory, so that a worker may fail at any moment."""

    every: Every = Field(
        default=1,
        description="Steps between two snapshots. auto: as few as cost under 3 % of a step. none: no snapshots; a "
        "failure sends the run back to its newest checkpoint.",
    )
    copies: int = Field(
        default=1,
        ge=1,
        le=2,
        description="Number of other workers that keep each worker's snapshots, on other nodes where possible. With 2 "
        "a worker may fail together with one of them; snapshots take more memory then, and twice the traffic.",
    )
    publish: Literal["finished", "committed"] = Field(
        default="finished",
        description="Steps that users and MLflow see where no second worker holds the state: without snapshots, or "
        "with one worker and no warm standby. finished: all that are finished; after a failure some are done again. "
        "committed: those that a checkpoint includes, so that a failure repeats no published step; a second worker on "
        "the same node doesn't count then where the run has several nodes.",
    )

    @property
    def interval(self) -> int | None:
        """Steps between two snapshots; with auto, the initial value until costs are known. None without snapshots."""
        return self.every if isinstance(self.every, int) else 1 if self.every == AUTO else None

    def whole_every(self, wanted: int) -> int:
        """One in this many snapshots is whole. Deltas are possible only between snapshots of consecutive steps."""
        return wanted if self.every in (1, AUTO) else 1


def _protection(value: Any) -> Any:
    if isinstance(value, str | bool):
        raise refuse("must be a mapping: {every: N} (steps), {every: auto} or {every: none}")
    return value


Protection = Annotated[ProtectionSpec, BeforeValidator(_protection, json_schema_input_type=ProtectionSpec)]

# -- The `recovery` section: budgets for failures, and the response to them --------------------------------------------

MAX_BUDGET = 200  # failures per hour; only so many are recorded


def _budget(default: int, what: str) -> int:
    description = f"{what}: limit per hour; the next one ends the run."
    budget: int = Field(default=default, ge=0, le=MAX_BUDGET, description=description)
    return budget


class BudgetsSpec(Section):
    """Limits on failures of each kind within an hour. Several workers failing at once count as one failure."""

    worker: int = _budget(100, "Worker processes that died")
    node: int = _budget(100, "Failures of whole nodes")
    network: int = _budget(100, "Connections that failed between live workers")
    hang: int = _budget(50, "Workers that stopped answering, or kept the others waiting")
    preemption: int = _budget(200, "Nodes preempted with notice")
    user_error: int = _budget(3, "Errors of the user's own code")
    out_of_memory: int = _budget(10, "Workers out of memory, which makes the micro-batch smaller each time")
    numeric: int = _budget(5, "Explosions of the loss")
    storage: int = _budget(20, "Checkpoints that could not be written")
    corrupted: int = _budget(
        5, "Workers whose state changed outside of updates, detected with verify.every, or whose GPU failed"
    )
    internal: int = _budget(5, "Errors of the training loop itself")


class RecoverySpec(Section):
    """Response to failures. Survivors of a failure continue at once, whatever is set here."""

    budgets: BudgetsSpec = Field(default=BudgetsSpec(), description="Failures of training workers per hour, by kind.")
    whole_every: int = Field(
        default=4,
        ge=1,
        le=16,
        description="With snapshots after every step, one in this many holds the whole state, the others only the "
        "step's gradients, from which it is recomputed. 1: all are whole, which takes less memory, but more time.",
    )
    quarantine_after: int | None = Field(
        default=5,
        ge=1,
        description="A node on which workers failed this often within an hour gets no new ones, as long as there are "
        "other nodes. null: never.",
    )
    loss_explosion: float | None = Field(
        default=2.0,
        gt=1,
        description="A step whose loss is this many times the median of the 32 before it, and at least 1 nat above it, "
        "is undone and its batch left out. null: losses are not checked.",
    )
    replace_stragglers: bool = Field(
        default=False,
        description="true: replace a worker that is much slower than the others for long. It is reported in any case.",
    )


# -- The `checkpoint` section: durable copies of the training state ----------------------------------------------------


class CheckpointSpec(Section):
    """Durable copies of the training state. One after the last step is always written."""

    every: Every = Field(
        default=AUTO,
        description="Steps between two checkpoints. auto: 2 to 40 minutes of training, as their cost and the run's "
        "failures make best; ten until the cost is known. none: only the final one.",
    )
    keep_last: int | None = Field(default=3, ge=1, description="Number of newest checkpoints to keep. null: all.")
    keep_best: int = Field(
        default=0,
        ge=0,
        description="Number of further checkpoints to keep, by lowest validation loss. Needs eval.every.",
    )


def broken_protection(
    protection: ProtectionSpec, checkpoint: CheckpointSpec, max_steps: int, min_workers: int
) -> Iterator[Broken]:
    """Rules of `protection`: there must be enough workers for the copies, and steps must not wait for too long for the
    checkpoint with which they are published."""
    if protection.copies > 1 and min_workers <= protection.copies:
        rule = (
            f"protection.copies {protection.copies} needs at least {protection.copies + 1} workers: raise workers.min, "
        )
        got = f"or leave protection.copies 1; got workers.min {min_workers}"
        yield Broken((("protection", "copies"), ("workers", "min")), rule + got)
    if protection.copies > 1 and protection.interval is None:
        rule = (
            f"protection.copies {protection.copies} needs snapshots: leave it out, or set protection.every; got {NONE}"
        )
        yield Broken((("protection", "copies"), ("protection", "every")), rule)
    steps = max_steps if checkpoint.every == NONE else checkpoint.every
    if protection.publish == COMMITTED and isinstance(steps, int) and steps > MAX_UNPUBLISHED:
        rule = f"checkpoint.every must be at most {MAX_UNPUBLISHED}, or auto, where protection.publish is {COMMITTED}: "
        why = f"steps may wait for a checkpoint to be published; got {checkpoint.every}"
        yield Broken((("checkpoint", "every"), ("protection", "publish"), ("train", "max_steps")), rule + why)


# -- The `verify` section: replay of a run's steps during training, and comparison -------------------------------------


class VerifySpec(Section):
    """Detection of results that hardware has corrupted. For runs with train.determinism exact."""

    every: int | None = Field(
        default=None,
        ge=1,
        description="Steps between two replays, in which a standby repeats some of the run's steps from its newest "
        "checkpoint and compares the results. Each worker also checks in every step that its state is as it left "
        "it. Needs a standby, with memory for the whole state, and checkpoints. null: no checks.",
    )
    steps: int = Field(
        default=8, ge=1, le=256, description="Number of steps in each replay: fewer than checkpoint.every."
    )


def broken_verification(
    verify: VerifySpec, checkpoint: CheckpointSpec, determinism: str, standby: int
) -> Iterator[Broken]:
    """Requirements of a replay: steps that reproduce their bits, a standby that runs them, and a starting point."""
    needs: tuple[tuple[Path, object, bool, str], ...] = (
        (("train", "determinism"), determinism, determinism == "exact", "exact"),
        (("workers", "standby"), standby, standby > 0, "at least 1"),
        (
            ("checkpoint", "every"),
            checkpoint.every,
            isinstance(checkpoint.every, int),
            "a number of steps",
        ),
    )
    for key, value, there, wanted in needs:
        if not there:
            rule = f"verify.every needs {'.'.join(map(str, key))} to be {wanted}; got {value}"
            yield Broken((("verify", "every"), key), rule)
    if isinstance(checkpoint.every, int) and verify.steps >= checkpoint.every:
        rule = "verify.steps must be less than checkpoint.every: they follow the newest checkpoint; "
        got = f"got {verify.steps} and {checkpoint.every}"
        yield Broken((("verify", "steps"), ("checkpoint", "every")), rule + got)
