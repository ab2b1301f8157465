"""Interface of callbacks: a user's code, called for a run's committed steps, which may steer the run.

    # early_stopping.py; in the job file: callbacks: [{entrypoint: "early_stopping:make", options: {patience: 3}}]
    def make(options):
        return EarlyStopping(options["patience"])

docs/callbacks.md is the guide.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.errors import EntrypointError
from orchestrator.spec.own_callbacks import CallbackSpec
from orchestrator.user_code import calling_user, function_of

KEY = "callbacks.entrypoint"

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


@dataclass(frozen=True)
class Step:
    """A committed step.

    Args:
        step: its number, from 0.
        loss: mean over the units of its global batch: target tokens, pairs or rows.
        metrics: of the task, by name; empty if it has none.
        validation_loss: None if no validation followed this step; `validation_metrics` are its metrics.
        lr: learning rate of its update.
        grad_norm: of the global gradient, before clipping; infinite if the update was skipped.
        applied: False if the update was skipped because of a gradient that isn't finite.
        tokens: target tokens, or rows, of its global batch.
        world_size: number of workers.
        step_s: duration in seconds.
        time: when it was done, in `time.time()` seconds.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    applied: bool
    tokens: int
    world_size: int
    step_s: float
    time: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    validation_loss: float | None = None
    validation_metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Scale:
    """Request for another number of workers, as `orchestrator scale`. Raises TypeError for a number that is no int."""

    workers: int
    reason: str = "asked for by a callback"

    def __post_init__(self) -> None:
        if type(self.workers) is not int:
            raise TypeError(f"Scale takes a number of workers, an int; got {self.workers!r}")


@dataclass(frozen=True)
class Stop:
    """Request for the run's end with a checkpoint, as `orchestrator stop`."""

    reason: str = "stopped by a callback"


@dataclass(frozen=True)
class Pause:
    """Request for the run's end with a checkpoint, to be resumed later, as `orchestrator pause`."""

    reason: str = "paused by a callback"


@dataclass(frozen=True)
class SaveCheckpoint:
    """Request for a checkpoint of this step or a later one, as `orchestrator checkpoint now`."""

    reason: str = "asked for by a callback"


Request = Scale | Stop | Pause | SaveCheckpoint


class Callback:
    """Base of callbacks. All methods run in one thread of a process of their own: training doesn't wait for them."""

    def on_step(self, step: Step) -> Request | None:
        """Called for every committed step, in order, some seconds after it at most. Steps are called again after the
        run was resumed from an earlier one."""
        return None

    def on_end(self, outcome: str, reason: str) -> None:
        """Called once the run has ended, after its last step: succeeded, failed, stopped or paused."""

    def state_dict(self) -> dict[str, Json]:
        """What `load_state_dict` needs to go on in another process: values that JSON has."""
        return {}

    def load_state_dict(self, state: dict[str, Json]) -> None:
        """Called before the first step if the process was replaced, or the run resumed, with what `state_dict` gave
        after some step. The first step that is called then is the one after that."""


def made(spec: CallbackSpec) -> Callback:
    """The callback of a section. Raises EntrypointError if it can't be imported or made, or isn't one."""
    name = f"{KEY} {spec.entrypoint}"
    make = function_of(KEY, spec.entrypoint, Path(spec.code_dir))
    with calling_user(name):
        callback = make(dict(spec.options))
    if not isinstance(callback, Callback):
        raise EntrypointError(
            f"{name} returned a {type(callback).__name__}",
            remedy="Return an object of a class that derives from orchestrator.callback.Callback.",
        )
    return callback
