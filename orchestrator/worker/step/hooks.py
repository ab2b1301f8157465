"""Hooks of a step: what its caller does at fixed points of it."""

from dataclasses import dataclass
from typing import Protocol

from orchestrator.storage.condition import StorageTrouble


@dataclass(frozen=True)
class RankProposal:
    """A rank's entries in a vote besides its part of the step.

    Args:
        checkpoint: by its clock a checkpoint is due after this step.
        is_writing: storage has not yet taken its part of an earlier checkpoint.
    """

    fence: int
    finish: bool
    interval: int
    stages: int = 0
    checkpoint: bool = False
    is_writing: bool = False


class StepHooks(Protocol):
    """Called by `TrainStep`, in the training thread. An exception from a hook ends the step."""

    def wait_for_rows(self, trouble: StorageTrouble | None) -> None:
        """Called again and again while the rows of the step aren't there, and once they are after a `trouble`.

        Args:
            trouble: why storage doesn't give them; None if they have only begun to be read, or are there.
        """
        ...

    def before_micro_batch(self) -> None:
        """Called before each micro-batch, evaluated ones included."""
        ...

    def before_update(self) -> None:
        """Called when the state is about to change; not if the update is skipped."""
        ...

    def propose(self, step: int) -> RankProposal:
        """Called at the last moment before the vote."""
        ...
