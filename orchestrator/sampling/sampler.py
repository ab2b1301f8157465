"""The rows that a step trains on: a pure function of the sampler state and the step.

Every row that a run consumes has a *position*: positions count from 0 through the whole run, `global_batch_size` per
step. Within a stage, an epoch is one pass over its rows, each in a different order; a batch may straddle two epochs.
This module knows neither world size, ranks nor micro-batches, so the order can't depend on them.
"""

import json
from dataclasses import asdict, dataclass, fields
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from orchestrator.errors import ProtocolError
from orchestrator.sampling.permutation import rows_at


@dataclass(frozen=True)
class Stage:
    """One difficulty level: from `first_step` on, rows of `sequence_length` tokens, `num_rows` to an epoch.

    `first_position` is the position at which `first_step` begins.
    """

    name: str
    first_step: int
    sequence_length: int
    num_rows: int
    first_position: int


@dataclass(frozen=True, eq=False)
class GlobalBatch:
    """The rows of one step, in order; the three arrays are `global_batch_size` long."""

    step: int
    stage: Stage
    first_position: int
    positions: NDArray[np.int64]  # first_position, first_position + 1, ...
    epochs: NDArray[np.int64]  # completed passes over the stage's rows before each position
    rows: NDArray[np.int64]  # row numbers in [0, stage.num_rows)


@dataclass(frozen=True)
class SamplerState:
    """All that determines the order of rows. Saved in checkpoints; the position follows from the step.

    Args:
        seed: of the order.
        global_batch_size: rows in a step, at every step of the run.
        stages: by `first_step`; the first begins at step 0 and position 0, each later one where its predecessor ends.

    Raises:
        ValueError: stages that don't follow one another, or a size below 1.
    """

    seed: int
    global_batch_size: int
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        if self.global_batch_size < 1:
            raise ValueError(f"global_batch_size is {self.global_batch_size}; a step needs at least 1 row")
        if not self.stages or (self.stages[0].first_step, self.stages[0].first_position) != (0, 0):
            raise ValueError(f"the first stage must begin at step 0 and position 0; the stages are {self.stages}")
        for stage in self.stages:
            if stage.num_rows < 1 or stage.sequence_length < 1:
                raise ValueError(f"{stage} is empty; a stage needs at least 1 row of at least 1 token")
        for before, after in pairwise(self.stages):
            num_steps = after.first_step - before.first_step
            wanted = before.first_position + num_steps * self.global_batch_size
            if num_steps < 1 or after.first_position != wanted:
                raise ValueError(f"{after} doesn't follow {before}; at that step it must begin at position {wanted}")

    @classmethod
    def of_one_stage(cls, seed: int, global_batch_size: int, sequence_length: int, num_rows: int) -> "SamplerState":
        """The state of a run without a curriculum."""
        return cls(seed, global_batch_size, (Stage("all", 0, sequence_length, num_rows, 0),))

    def stage_at(self, step: int) -> Stage:
        """The stage of `step`. Raises ValueError for a negative step."""
        if step < 0:
            raise ValueError(f"step {step} doesn't exist; steps count from 0")
        return next(stage for stage in reversed(self.stages) if stage.first_step <= step)

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "SamplerState":
        """Parse the output of `to_json`. Raises ProtocolError for anything else: a saved state has no defaults."""
        try:
            state = json.loads(text)
            _require_fields(cls, state)
            for stage in state["stages"]:
                _require_fields(Stage, stage)
            return cls(state["seed"], state["global_batch_size"], tuple(Stage(**stage) for stage in state["stages"]))
        except ValueError as error:
            raise ProtocolError(
                f"a saved sampler state doesn't fit: {error}",
                remedy="Resume from another checkpoint, or with the version that wrote this one.",
                unchanged="The sampler was not changed.",
            ) from error


def sample(state: SamplerState, step: int) -> GlobalBatch:
    """The global batch of `step`, in constant time and memory. Raises ValueError for a negative step."""
    stage = state.stage_at(step)
    offset = (step - stage.first_step) * state.global_batch_size
    offsets = np.arange(offset, offset + state.global_batch_size, dtype=np.int64)
    epochs, in_epoch = np.divmod(offsets, stage.num_rows)
    return GlobalBatch(
        step=step,
        stage=stage,
        first_position=stage.first_position + offset,
        positions=stage.first_position + offsets,
        epochs=epochs,
        rows=rows_at(state.seed, epochs, in_epoch, stage.num_rows),
    )


_JSON_TYPES: dict[object, type] = {int: int, str: str, tuple[Stage, ...]: list}


def _require_fields(kind: type[SamplerState] | type[Stage], value: object) -> None:
    """Raise ValueError unless `value` is an object with exactly the fields of `kind`, each of its type."""
    names = {field.name: _JSON_TYPES[field.type] for field in fields(kind)}
    if not isinstance(value, dict) or value.keys() != names.keys():
        raise ValueError(f"{kind.__name__} must have exactly the fields {sorted(names)}; found {value!r}")
    for name, wanted in names.items():
        if type(value[name]) is not wanted:  # not isinstance: true would pass for a number
            raise ValueError(f"{kind.__name__}.{name} must be of type {wanted.__name__}; found {value[name]!r}")
