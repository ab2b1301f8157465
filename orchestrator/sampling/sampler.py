"""The rows that a step trains on: a pure function of the sampler state and the step.

Every row that a run consumes has a *position*: positions count from 0 through the whole run, `global_batch_size` per
step. An epoch is one pass over the rows, each in a different order; a batch may straddle two epochs. This module knows
neither world size, ranks nor micro-batches, so the order can't depend on them.
"""

import json
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from orchestrator.errors import ProtocolError
from orchestrator.sampling.permutation import rows_at


@dataclass(frozen=True)
class SamplerState:
    """All that determines the order of rows. Saved in checkpoints; the position follows from the step.

    Args:
        seed: of the order.
        global_batch_size: rows in a step.
        sequence_length: tokens of a row, or of the longest row.
        num_rows: rows in an epoch.

    Raises:
        ValueError: a size below 1.
    """

    seed: int
    global_batch_size: int
    sequence_length: int
    num_rows: int

    def __post_init__(self) -> None:
        if min(self.global_batch_size, self.sequence_length, self.num_rows) < 1:
            raise ValueError(f"a step has at least 1 row of at least 1 token, and so has an epoch; got {self}")

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "SamplerState":
        """Parse the output of `to_json`. Raises ProtocolError for anything else: a saved state has no defaults."""
        try:
            saved = json.loads(text)
            if not isinstance(saved, dict) or any(type(value) is not int for value in saved.values()):
                raise ValueError(f"it holds numbers by name; found {saved!r}")  # true is no number here
            return cls(**saved)
        except (TypeError, ValueError) as error:
            raise ProtocolError(
                f"a saved sampler state doesn't fit: {error}",
                remedy="Resume from another checkpoint, or with the version that wrote this one.",
                unchanged="The sampler was not changed.",
            ) from error


def sample(state: SamplerState, step: int) -> NDArray[np.int64]:
    """The rows of `step`, in [0, num_rows), in constant time and memory. Raises ValueError for a negative step."""
    if step < 0:
        raise ValueError(f"step {step} doesn't exist; steps count from 0")
    first_position = step * state.global_batch_size
    positions = np.arange(first_position, first_position + state.global_batch_size, dtype=np.int64)
    epochs, in_epoch = np.divmod(positions, state.num_rows)
    return rows_at(state.seed, epochs, in_epoch, state.num_rows)
